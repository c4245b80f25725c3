package cli

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

func (a *app) policyListCommand() *cobra.Command {
	var kind, namespace string
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List resources",
		Long: `List the resources in force, of all kinds or of one, each with what it says in short.
-o wide adds how many connections each policy has decided, and when it last did.
-o name prints references that "policy get" and "policy delete" take.`,
		Example: `  symbolon policy list --namespace /acme/prod
  symbolon policy list --kind external -o name`,
		Args: cobra.NoArgs,
		RunE: a.run(func(ctx context.Context, _ []string) error { return a.policyList(ctx, kind, namespace) }),
	}
	a.namespaceFlag(cmd, &namespace, "only this namespace and those below it")
	cmd.Flags().StringVar(&kind, "kind", "", "only this kind: "+strings.Join(kinds, ", "))
	cobra.CheckErr(cmd.RegisterFlagCompletionFunc("kind", cobra.FixedCompletions(
		kinds, cobra.ShellCompDirectiveNoFileComp)))
	a.outputFlag(cmd, listFormats...)
	return cmd
}

func (a *app) policyList(ctx context.Context, kind, namespace string) error {
	if kind != "" {
		var err error
		if kind, err = parseKind(kind); err != nil {
			return err
		}
	}
	c, err := a.client()
	if err != nil {
		return err
	}
	resp, err := a.resources(ctx, c, kind, namespace)
	if err != nil {
		return err
	}
	if a.output == "yaml" {
		return a.write([]byte(sanitize(resp.GetYaml(), true)))
	}
	l := list{message: resp, empty: "no such resources"}
	for _, r := range resp.GetResources() {
		l.names = append(l.names, refOf(r))
	}
	var hits map[string]*symbolonv1.PolicyHits
	if a.output == "wide" {
		if hits, err = a.policyHits(ctx, c, namespace); err != nil {
			return err
		}
	}
	l.table = func(wide bool) *table {
		t := a.newTable(wide, "KIND", "NAMESPACE", "NAME", "SAYS", "|", "HITS", "LAST HIT")
		for _, r := range resp.GetResources() {
			says := summary(r)
			if !wide {
				says = shorten(says, 80)
			}
			decided := a.hitCells(r, hits)
			t.row(text(kindOf(r)), text(r.GetNamespace()), text(r.GetName()), text(says), decided[0], decided[1])
		}
		return t
	}
	return a.printList(l)
}

func (a *app) policyGetCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "get [KIND:]/NAMESPACE/NAME...",
		Short: "Print resources as YAML",
		Long: `Print resources in the form that "policy apply" takes. The kind is Policy where it is
not said; a namespace is namespace:/its/path. How many connections a policy has decided
is said on stderr.`,
		Example: `  symbolon policy get /acme/prod/web-may-call-api
  symbolon policy get profile:/acme/prod/web namespace:/acme/prod`,
		Args:              cobra.MinimumNArgs(1),
		RunE:              a.run(a.policyGet),
		ValidArgsFunction: a.completeRefs(),
	}
	a.outputFlag(cmd, "yaml", "json")
	return cmd
}

func (a *app) policyGet(ctx context.Context, args []string) error {
	keys, err := parseRefs(args)
	if err != nil {
		return err
	}
	c, err := a.client()
	if err != nil {
		return err
	}
	for i, key := range keys {
		resp, err := a.resources(ctx, c, key.GetKind(), key.GetNamespace())
		if err != nil {
			return err
		}
		found, doc, err := pick(resp, key)
		if err != nil {
			return err
		}
		if a.output == "json" {
			err = a.json(found)
		} else {
			if i > 0 {
				doc = "---\n" + doc
			}
			err = a.write([]byte(sanitize(doc, true)))
		}
		if err != nil {
			return err
		}
		if found.GetPolicy() == nil {
			continue
		}
		hits, err := a.policyHits(ctx, c, key.GetNamespace())
		if err != nil {
			return err
		}
		if h := hits[policyRef(key.GetNamespace(), key.GetName())]; h != nil {
			a.say("%s has decided %d connections, the last %s", h.GetPolicy(), h.GetConnections(), ago(a.Now(), h.GetLast()))
		}
	}
	return nil
}

func parseRefs(args []string) ([]*symbolonv1.ResourceKey, error) {
	var keys []*symbolonv1.ResourceKey
	for _, s := range args {
		key, err := parseRef(s)
		if err != nil {
			return nil, err
		}
		keys = append(keys, key)
	}
	return keys, nil
}

// pick finds a resource in an answer, with its YAML document: they come in the
// same order.
func pick(resp *symbolonv1.ListResourcesResponse, key *symbolonv1.ResourceKey) (*symbolonv1.Resource, string, error) {
	docs := splitYAML(resp.GetYaml())
	if len(docs) != len(resp.GetResources()) {
		return nil, "", &exitError{ExitUnreachable, fmt.Errorf("the controller sent %d documents for %d resources",
			len(docs), len(resp.GetResources()))}
	}
	for i, r := range resp.GetResources() {
		if kindOf(r) == key.GetKind() && r.GetNamespace() == key.GetNamespace() && r.GetName() == key.GetName() {
			return r, docs[i], nil
		}
	}
	return nil, "", notFoundf("no %s", formatRef(key.GetKind(), key.GetNamespace(), key.GetName()))
}

// splitYAML cuts at document markers. The controller writes no block scalars, in
// which such a line could be text.
func splitYAML(s string) []string {
	var docs []string
	var doc strings.Builder
	end := func() {
		if strings.TrimSpace(doc.String()) != "" {
			docs = append(docs, doc.String())
		}
		doc.Reset()
	}
	for line := range strings.Lines(s) {
		if strings.TrimRight(line, " \r\n") == "---" {
			end()
			continue
		}
		doc.WriteString(line)
	}
	end()
	return docs
}

func (a *app) policyDeleteCommand() *cobra.Command {
	var message string
	cmd := &cobra.Command{
		Use:   "delete [KIND:]/NAMESPACE/NAME...",
		Short: "Delete resources: one generation, or nothing",
		Long: `Delete resources. All of them go in one generation, or none does. PolicyTests that
the rest would fail, and namespaces that are not empty, refuse it.`,
		Example: `  symbolon policy delete /acme/prod/web-may-call-api
  symbolon policy delete --yes $(symbolon policy list --kind external -n /acme/dev -o name)`,
		Args: cobra.MinimumNArgs(1),
		RunE: a.run(func(ctx context.Context, args []string) error {
			return a.policyDelete(ctx, args, message)
		}),
		ValidArgsFunction: a.completeRefs(),
	}
	messageFlag(cmd, &message)
	a.yesFlag(cmd)
	return cmd
}

func (a *app) policyDelete(ctx context.Context, args []string, message string) error {
	keys, err := parseRefs(args)
	if err != nil {
		return err
	}
	c, err := a.client()
	if err != nil {
		return err
	}
	if err := a.confirm("delete %s", strings.Join(args, ", ")); err != nil {
		return err
	}
	resp, err := call(ctx, a, c.Delete, &symbolonv1.DeleteRequest{Keys: keys, Message: message})
	if err != nil {
		return err
	}
	a.say("generation %d", resp.GetGeneration())
	return nil
}
