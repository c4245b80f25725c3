package cli

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/api/symbolon/v1/symbolonv1connect"
)

func (a *app) explainCommand() *cobra.Command {
	var from, to, port, flow string
	cmd := &cobra.Command{
		Use:   "explain (--from X --to Y --port P | --flow ID)",
		Short: "Explain what policy says of a connection, and why",
		Long: `Ask the controller to decide as the two proxies would, and to say why. Both sides
must allow: the client's by the policies on its namespace's chain, the server's by
those on its own.

Each end is one of
  spiffe://acme.example/acme/prod/web   a workload that holds an SVID; of another trust
                                        domain: only the other side is judged
  app=web,env=prod@/acme/prod           attributes, in a namespace
  203.0.113.10                          an address outside, judged as External
  api.pay.example.com                   as destination: a name that an External has (fqdns)

With --flow, the question is what policy says now of a connection that was recorded:
'symbolon flows -o wide' shows the ids, of which the first 8 digits are enough.

For each side it prints the chain of namespaces with their defaults, every candidate
policy with the first clause that failed, what decided, and what the connection would
be obliged to. Exit code 0: allowed; 1: denied.`,
		Example: `  symbolon explain --from app=web,env=prod@/acme/prod --to app=db@/acme/prod --port 5432
  symbolon explain --from spiffe://acme.example/acme/prod/web --to 203.0.113.10 --port tcp/443
  symbolon explain --flow 5f0c2a91`,
		Args: cobra.NoArgs,
		RunE: a.run(func(ctx context.Context, _ []string) error { return a.explain(ctx, from, to, port, flow) }),
	}
	f := cmd.Flags()
	f.StringVar(&from, "from", "", "the client")
	f.StringVar(&to, "to", "", "the server")
	f.StringVar(&port, "port", "", "the server's port: 443 or tcp/443")
	f.StringVar(&flow, "flow", "", "a recorded connection, by its flow id")
	for _, name := range []string{"from", "to"} {
		cmd.MarkFlagsMutuallyExclusive("flow", name)
		cobra.CheckErr(cmd.RegisterFlagCompletionFunc(name, a.completeWorkloads()))
	}
	cmd.MarkFlagsMutuallyExclusive("flow", "port")
	a.outputFlag(cmd, "table", "json", "yaml")
	return cmd
}

func (a *app) completeWorkloads() cobra.CompletionFunc {
	return a.complete(func(ctx context.Context, c symbolonv1connect.AdminServiceClient) (names []string) {
		resp, err := call(ctx, a, c.ListWorkloads, &symbolonv1.ListWorkloadsRequest{})
		if err != nil {
			return nil
		}
		for _, w := range resp.GetWorkloads() {
			names = append(names, w.GetSpiffeId())
		}
		return names
	})
}

func (a *app) explain(ctx context.Context, from, to, port, flow string) error {
	req, err := explainRequest(from, to, port, flow)
	if err != nil {
		return err
	}
	c, err := a.client()
	if err != nil {
		return err
	}
	resp, err := call(ctx, a, c.Explain, req)
	if err != nil {
		return err
	}
	if flow != "" {
		req = &symbolonv1.ExplainRequest{From: resp.GetFrom(), To: resp.GetTo(), Protocol: resp.GetProtocol(), Port: resp.GetPort()}
	}
	err = a.show(resp, func() error { return a.printExplanation(req, resp) })
	if err == nil && !resp.GetAllow() {
		err = errNegative
	}
	return err
}

func explainRequest(from, to, port, flow string) (req *symbolonv1.ExplainRequest, err error) {
	if flow != "" {
		return &symbolonv1.ExplainRequest{Flow: flow}, nil
	}
	req = &symbolonv1.ExplainRequest{}
	if req.From, err = parseEndpoint("from", from); err != nil {
		return nil, err
	}
	if req.To, err = parseEndpoint("to", to); err != nil {
		return nil, err
	}
	if req.Protocol, req.Port, err = parsePort(port); err != nil {
		return nil, err
	}
	return req, nil
}

// recordText is what a proxy made of a connection when it was there.
func recordText(f *symbolonv1.FlowRecord) string {
	s := fmt.Sprintf("recorded by %s (%s): %s, %s", f.GetHost(), word(f.GetReporter()), word(f.GetOutcome()), word(f.GetReason()))
	if p := f.GetPeerReason(); p != symbolonv1.Reason_REASON_UNSPECIFIED {
		s += ": " + word(p)
	}
	return s + fmt.Sprintf(", by generation %d", f.GetGeneration())
}

func (a *app) printExplanation(req *symbolonv1.ExplainRequest, resp *symbolonv1.ExplainResponse) error {
	p := a.painter()
	var b strings.Builder
	line := func(indent int, cells ...cell) {
		b.WriteString(strings.Repeat(" ", indent))
		for i, c := range cells {
			if i > 0 {
				b.WriteByte(' ')
			}
			b.WriteString(p.paint(c))
		}
		b.WriteByte('\n')
	}
	protection := word(resp.GetProtection())
	if protection == "" {
		protection = "not encrypted"
	}
	if resp.GetAllow() {
		line(0, yes("allowed, "+protection))
	} else {
		line(0, no("denied"))
	}
	line(2, text("from"), text(endpointText(req.GetFrom())))
	line(2, text("to  "), text(endpointText(req.GetTo())), text(fmt.Sprintf("%s/%d", req.GetProtocol(), req.GetPort())))
	line(2, text(fmt.Sprintf("by generation %d", resp.GetGeneration())))
	for _, f := range resp.GetRecords() {
		line(2, text(recordText(f)))
	}
	for _, side := range resp.GetSides() {
		b.WriteByte('\n')
		line(0, cell{side.GetSide() + "'s side:", bold}, verdictCell(side.GetAllow()), text(decider(side)))
		line(2, text("obliged to: "+obligations(side)))
		if len(side.GetChain()) > 0 {
			line(2, text("namespaces, from leaf to root:"))
		}
		for _, ns := range side.GetChain() {
			line(4, text(ns))
		}
		if len(side.GetCandidates()) == 0 {
			line(2, text("no policy on this chain"))
			continue
		}
		line(2, text("policies on this chain:"))
		for _, c := range side.GetCandidates() {
			line(4, candidateCells(c)...)
		}
	}
	return a.write([]byte(b.String()))
}

func verdictCell(allow bool) cell {
	if allow {
		return yes("allow")
	}
	return no("deny")
}

// decider says what decided a side.
func decider(s *symbolonv1.ExplainSide) string {
	reason := word(s.GetReason())
	if s.GetPolicy() == "" {
		return fmt.Sprintf("(%s)", reason)
	}
	return fmt.Sprintf("by %s (%s)", s.GetPolicy(), reason)
}

func obligations(s *symbolonv1.ExplainSide) string {
	var parts []string
	if p := word(s.GetProtection()); p != "" {
		parts = append(parts, "be "+p)
	}
	if s.GetLog() {
		parts = append(parts, "be logged")
	}
	if len(parts) == 0 {
		return "nothing"
	}
	return strings.Join(parts, ", ")
}

func candidateCells(c *symbolonv1.Candidate) []cell {
	name := c.GetPolicy()
	verb := word(c.GetVerb())
	if c.GetMode() == symbolonv1.Mode_MODE_OBSERVE {
		verb += ", observed"
	}
	if c.GetMatches() {
		return []cell{{"✓ matches", green}, text(name), text("(" + verb + ")")}
	}
	return []cell{{"· does not", faint}, text(name), text("(" + verb + "):"), text(c.GetFailed())}
}
