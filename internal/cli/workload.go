package cli

import (
	"cmp"
	"context"
	"slices"

	"github.com/spf13/cobra"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

func (a *app) workloadCommand() *cobra.Command {
	return group("workload", "List workloads",
		`A workload is what policy speaks of: a service on a host, found by its cgroup,
executable and user, and named by Profiles. Each has an X.509-SVID, issued when it first
used the network.`,
		`  symbolon workload list`,
		a.workloadListCommand())
}

func (a *app) workloadListCommand() *cobra.Command {
	var namespace string
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List workloads that hold an SVID",
		Long: `List the workloads that hold a valid SVID, with the labels that Profiles gave them;
-o wide shows all attributes. A workload that no Profile names is called
unprofiled.UNIT.`,
		Example: `  symbolon workload list --namespace /acme/prod
  symbolon workload list -o name`,
		Args: cobra.NoArgs,
		RunE: a.run(func(ctx context.Context, _ []string) error { return a.workloadList(ctx, namespace) }),
	}
	a.namespaceFlag(cmd, &namespace, "only workloads of this namespace and those below it")
	a.outputFlag(cmd, listFormats...)
	return cmd
}

func (a *app) workloadList(ctx context.Context, namespace string) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	resp, err := call(ctx, a, c.ListWorkloads, &symbolonv1.ListWorkloadsRequest{Namespace: namespace})
	if err != nil {
		return err
	}
	slices.SortFunc(resp.Workloads, func(x, y *symbolonv1.Workload) int {
		return cmp.Or(cmp.Compare(x.GetSpiffeId(), y.GetSpiffeId()), cmp.Compare(x.GetHostId(), y.GetHostId()))
	})
	l := list{message: resp, empty: "no workloads hold an SVID"}
	for _, w := range resp.GetWorkloads() {
		l.names = append(l.names, w.GetSpiffeId())
	}
	l.table = func(wide bool) *table {
		t := a.newTable(wide, "SPIFFE ID", "HOST", "LABELS", "SVID EXPIRES", "|", "ISSUED", "SERIAL", "ATTRIBUTES")
		for _, w := range resp.GetWorkloads() {
			expires := text(ago(a.Now(), w.GetNotAfter()))
			if wide {
				expires = text(absolute(a.Location, w.GetNotAfter()))
			}
			t.row(text(w.GetSpiffeId()), text(w.GetHostId()), text(attributes(labels(w.GetAttributes()))), expires,
				text(absolute(a.Location, w.GetIssued())), text(w.GetSerial()), text(attributes(w.GetAttributes())))
		}
		return t
	}
	return a.printList(l)
}
