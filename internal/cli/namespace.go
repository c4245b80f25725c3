package cli

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/spf13/cobra"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

func (a *app) namespaceCommand() *cobra.Command {
	return group("namespace", "List and create namespaces",
		`Namespaces form a tree. Each says what holds where no policy decides (default), how
connections are protected, and which labels may be used in it and below.`,
		`  symbolon namespace list
  symbolon namespace create /acme --default deny`,
		a.namespaceListCommand(), a.namespaceCreateCommand())
}

func (a *app) namespaceListCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List namespaces",
		Long: `List the namespaces with their mode, default and protection. "inherit" takes the
nearest ancestor's.`,
		Example: `  symbolon namespace list
  symbolon namespace list -o wide`,
		Args: cobra.NoArgs,
		RunE: a.run(a.namespaceList),
	}
	a.outputFlag(cmd, listFormats...)
	return cmd
}

func (a *app) namespaceList(ctx context.Context, _ []string) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	resp, err := a.resources(ctx, c, "Namespace", "")
	if err != nil {
		return err
	}
	l := list{message: resp, empty: "no namespaces"}
	for _, r := range resp.GetResources() {
		l.names = append(l.names, r.GetNamespace())
	}
	l.table = func(wide bool) *table {
		t := a.newTable(wide, "PATH", "MODE", "DEFAULT", "PROTECTION", "|", "LABELS")
		for _, r := range resp.GetResources() {
			ns := r.GetNamespaceKind()
			t.row(text(r.GetNamespace()), text(word(ns.GetMode())), text(orInherit(word(ns.GetDefault()))),
				text(orInherit(word(ns.GetProtection()))), text(vocabulary(ns.GetAttributes())))
		}
		return t
	}
	return a.printList(l)
}

func orInherit(s string) string {
	if s == "" {
		return "inherit"
	}
	return s
}

// vocabulary writes "app env=dev,qa,prod".
func vocabulary(m map[string]*symbolonv1.AttributeRule) string {
	var parts []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		if vs := m[k].GetValues(); len(vs) > 0 {
			k += "=" + strings.Join(vs, ",")
		}
		parts = append(parts, k)
	}
	return strings.Join(parts, " ")
}

// namespaceYAML is a Namespace as docs/policy.md has it.
type namespaceYAML struct {
	Kind       string                 `yaml:"kind"`
	Name       string                 `yaml:"name"`
	Mode       string                 `yaml:"mode"`
	Default    string                 `yaml:"default,omitempty"`
	Protection string                 `yaml:"protection,omitempty"`
	Attributes map[string]allowedYAML `yaml:"attributes,omitempty"`
}

type allowedYAML struct {
	Values []string `yaml:"values,omitempty"`
}

func (a *app) namespaceCreateCommand() *cobra.Command {
	ns := namespaceYAML{Kind: "Namespace"}
	var labelArgs []string
	cmd := &cobra.Command{
		Use:   "create PATH",
		Short: "Create a namespace",
		Long: `Create a namespace; its parent must exist. To change one, apply a file with it:
"symbolon policy get namespace:PATH" prints what to start from.`,
		Example: `  symbolon namespace create /acme --label app --label env=dev,qa,prod
  symbolon namespace create /acme/prod --default deny --protection encrypted`,
		Args: cobra.ExactArgs(1),
		RunE: a.run(func(ctx context.Context, args []string) error {
			ns.Name = args[0]
			return a.namespaceCreate(ctx, ns, labelArgs)
		}),
	}
	f := cmd.Flags()
	f.StringVar(&ns.Mode, "mode", "enforce", "enforce, or learn: see symbolon learn")
	f.StringVar(&ns.Default, "default", "inherit", "what holds where no policy decides: deny, allow, inherit")
	f.StringVar(&ns.Protection, "protection", "inherit", "encrypted, authenticated, inherit")
	f.StringArrayVar(&labelArgs, "label", nil, "KEY or KEY=VALUE,...: a label that may be used here and below (repeatable)")
	return cmd
}

func (a *app) namespaceCreate(ctx context.Context, ns namespaceYAML, labelArgs []string) error {
	if err := checkNamespace(ns.Name); err != nil {
		return err
	}
	ns.Attributes = map[string]allowedYAML{}
	for _, l := range labelArgs {
		key, values, _ := strings.Cut(l, "=")
		if _, twice := ns.Attributes[key]; twice || key == "" {
			return usagef("--label %q: want each KEY once, as KEY or KEY=VALUE,...", l)
		}
		var allowed allowedYAML
		if values != "" {
			allowed.Values = strings.Split(values, ",")
		}
		ns.Attributes[key] = allowed
	}
	doc, err := yaml.Marshal(ns)
	if err != nil {
		return fmt.Errorf("format namespace: %w", err)
	}
	c, err := a.client()
	if err != nil {
		return err
	}
	existing, err := a.resources(ctx, c, "Namespace", "")
	if err != nil {
		return err
	}
	// An apply would change it; create must not.
	if slices.ContainsFunc(existing.GetResources(), func(r *symbolonv1.Resource) bool {
		return kindOf(r) == "Namespace" && r.GetNamespace() == ns.Name
	}) {
		return conflictf("namespace %s exists already; change it with: symbolon policy apply", ns.Name)
	}
	resp, err := call(ctx, a, c.Apply, &symbolonv1.ApplyRequest{
		Files: []*symbolonv1.SourceFile{{Name: "command line", Content: doc}},
	})
	if err != nil {
		return err
	}
	return a.printChanges(resp, "")
}
