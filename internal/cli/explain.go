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
	var from, to, port string
	cmd := &cobra.Command{
		Use:   "explain --from X --to Y --port P",
		Short: "Explain what policy says of a connection, and why",
		Long: `Ask the controller to decide as the two proxies would, and to say why. Both sides
must allow: the client's by the policies on its namespace's chain, the server's by
those on its own.

Each end is one of
  spiffe://acme.example/acme/prod/web   a workload that holds an SVID
  app=web,env=prod@/acme/prod           attributes, in a namespace
  203.0.113.10                          an address outside, judged as External
  api.pay.example.com                   as destination: a name that an External has (fqdns)

For each side it prints the chain of namespaces with their defaults, every candidate
policy with the first clause that failed, what decided, and what the connection would
be obliged to. Exit code 0: allowed; 1: denied.`,
		Example: `  symbolon explain --from app=web,env=prod@/acme/prod --to app=db@/acme/prod --port 5432
  symbolon explain --from spiffe://acme.example/acme/prod/web --to 203.0.113.10 --port tcp/443`,
		Args: cobra.NoArgs,
		RunE: a.run(func(ctx context.Context, _ []string) error { return a.explain(ctx, from, to, port) }),
	}
	f := cmd.Flags()
	f.StringVar(&from, "from", "", "the client")
	f.StringVar(&to, "to", "", "the server")
	f.StringVar(&port, "port", "", "the server's port: 443 or tcp/443")
	for _, name := range []string{"from", "to"} {
		cobra.CheckErr(cmd.RegisterFlagCompletionFunc(name, a.completeWorkloads()))
	}
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

func (a *app) explain(ctx context.Context, from, to, port string) error {
	var (
		req symbolonv1.ExplainRequest
		err error
	)
	if req.From, err = parseEndpoint("from", from); err != nil {
		return err
	}
	if req.To, err = parseEndpoint("to", to); err != nil {
		return err
	}
	if req.Protocol, req.Port, err = parsePort(port); err != nil {
		return err
	}
	c, err := a.client()
	if err != nil {
		return err
	}
	resp, err := call(ctx, a, c.Explain, &req)
	if err != nil {
		return err
	}
	switch a.output {
	case "json":
		err = a.json(resp)
	case "yaml":
		err = a.yaml(resp)
	default:
		err = a.printExplanation(&req, resp)
	}
	if err == nil && !resp.GetAllow() {
		err = errNegative
	}
	return err
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
