package cli

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/api/symbolon/v1/symbolonv1connect"
)

// kinds of resources, as YAML spells them.
var kinds = []string{"Namespace", "TrustDomain", "Profile", "Policy", "External", "Service", "PolicyTest"}

// parseKind takes a kind in any case, also in the plural.
func parseKind(s string) (string, error) {
	for _, k := range kinds {
		if strings.EqualFold(s, k) || strings.EqualFold(s, k+"s") || k == "Policy" && strings.EqualFold(s, "policies") {
			return k, nil
		}
	}
	return "", usagef("unknown kind %q: want one of %s", s, strings.Join(kinds, ", "))
}

// parseRef reads "[KIND:]/namespace/name"; the kind is Policy where it is not said,
// and a Namespace's reference is its path.
func parseRef(s string) (*symbolonv1.ResourceKey, error) {
	key := &symbolonv1.ResourceKey{Kind: "Policy"}
	kind, path, ok := strings.Cut(s, ":")
	if !ok {
		path = s
	} else {
		var err error
		if key.Kind, err = parseKind(kind); err != nil {
			return nil, err
		}
	}
	i := strings.LastIndexByte(path, '/')
	if !strings.HasPrefix(path, "/") || key.Kind != "Namespace" && path[i+1:] == "" {
		return nil, usagef("reference %q: want [kind:]/namespace/name, such as /acme/prod/web-may-call-api or external:/acme/office", s)
	}
	if key.Kind == "Namespace" {
		key.Namespace = path
		return key, nil
	}
	key.Namespace, key.Name = path[:i], path[i+1:]
	if key.Namespace == "" {
		key.Namespace = "/"
	}
	return key, nil
}

// formatRef is the inverse of parseRef, with the kind said.
func formatRef(kind, namespace, name string) string {
	kind = strings.ToLower(kind)
	switch {
	case name == "":
		return kind + ":" + namespace
	case namespace == "/":
		return kind + ":/" + name
	default:
		return kind + ":" + namespace + "/" + name
	}
}

func kindOf(r *symbolonv1.Resource) string {
	switch r.GetKind().(type) {
	case *symbolonv1.Resource_NamespaceKind:
		return "Namespace"
	case *symbolonv1.Resource_Profile:
		return "Profile"
	case *symbolonv1.Resource_Policy:
		return "Policy"
	case *symbolonv1.Resource_External:
		return "External"
	case *symbolonv1.Resource_Service:
		return "Service"
	case *symbolonv1.Resource_PolicyTest:
		return "PolicyTest"
	case *symbolonv1.Resource_TrustDomain:
		return "TrustDomain"
	default:
		return "Unknown" // of a newer controller
	}
}

func refOf(r *symbolonv1.Resource) string {
	return formatRef(kindOf(r), r.GetNamespace(), r.GetName())
}

// resources asks for a kind (empty: all) in a namespace and below.
func (a *app) resources(ctx context.Context, c symbolonv1connect.AdminServiceClient, kind, namespace string) (*symbolonv1.ListResourcesResponse, error) {
	return call(ctx, a, c.ListResources, &symbolonv1.ListResourcesRequest{Kind: kind, Namespace: namespace})
}

// complete offers names from the controller to the shell; silently nothing where
// it cannot be asked.
func (a *app) complete(names func(ctx context.Context, c symbolonv1connect.AdminServiceClient) []string) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		c, err := a.client()
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		offered := slices.DeleteFunc(names(cmd.Context(), c), func(n string) bool { return slices.Contains(args, n) })
		return offered, cobra.ShellCompDirectiveNoFileComp
	}
}

func (a *app) completeRefs() cobra.CompletionFunc {
	return a.complete(func(ctx context.Context, c symbolonv1connect.AdminServiceClient) (names []string) {
		resp, err := a.resources(ctx, c, "", "")
		if err != nil {
			return nil
		}
		for _, r := range resp.GetResources() {
			names = append(names, refOf(r))
		}
		return names
	})
}

func (a *app) completeNamespaces() cobra.CompletionFunc {
	return a.complete(func(ctx context.Context, c symbolonv1connect.AdminServiceClient) (names []string) {
		resp, err := a.resources(ctx, c, "Namespace", "")
		if err != nil {
			return nil
		}
		for _, r := range resp.GetResources() {
			names = append(names, r.GetNamespace())
		}
		return names
	})
}

// namespaceFlag adds --namespace, which the shell can complete.
func (a *app) namespaceFlag(cmd *cobra.Command, p *string, usage string) {
	cmd.Flags().StringVarP(p, "namespace", "n", "", usage)
	cobra.CheckErr(cmd.RegisterFlagCompletionFunc("namespace", a.completeNamespaces()))
}

// checkNamespace refuses what cannot be a namespace before the controller does.
func checkNamespace(s string) error {
	if !strings.HasPrefix(s, "/") || s != "/" && strings.HasSuffix(s, "/") || strings.Contains(s, "//") {
		return usagef("namespace %q: want an absolute path such as /acme/prod", s)
	}
	return nil
}

// confirm asks before something is destroyed. Without a terminal there is nobody
// to ask, and --yes has to be said.
func (a *app) confirm(format string, args ...any) error {
	if a.yes {
		return nil
	}
	question := sanitize(fmt.Sprintf(format, args...), false)
	if !isTerminal(a.Stdin) {
		return usagef("%s: not without --yes, since nobody can be asked here", question)
	}
	_, _ = fmt.Fprintf(a.Stderr, "%s? [y/N] ", question)
	var answer string
	if _, err := fmt.Fscanln(a.Stdin, &answer); err != nil || !strings.EqualFold(answer, "y") && !strings.EqualFold(answer, "yes") {
		return &exitError{ExitNegative, fmt.Errorf("left as it is")}
	}
	return nil
}

func (a *app) yesFlag(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&a.yes, "yes", false, "do it without asking")
}
