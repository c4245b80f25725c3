package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/flow"
)

func (a *app) flowsCommand() *cobra.Command {
	var (
		follow, edges      bool
		since              time.Duration
		outcome, namespace string
		last               uint32
	)
	cmd := &cobra.Command{
		Use:   "flows",
		Short: "Show what connected to what, and what became of it",
		Long: `Show records of connections, the newest last. Each is what one proxy saw: where both
ends have one there are two, with the same flow id (-o wide). --follow goes on until
it is interrupted.

The controller keeps a bounded number of records in memory; records that were lost are
said to be.

-o json prints one record a line, in the form that proxies write to their files.

--edges shows what many connections had in common instead: who reached whom on which
port, what became of it, how often, and when first and last. Edges are kept for weeks;
each side of a connection reports its own (-o wide). Proxies report a new edge after
ten seconds, and a known one every minute.`,
		Example: `  symbolon flows --outcome deny
  symbolon flows --follow --namespace /acme/prod
  symbolon flows --edges --since 24h --outcome deny
  symbolon flows --last 0 -o json | jq -r 'select(.outcome=="deny").reason'`,
		Args: cobra.NoArgs,
		RunE: a.run(func(ctx context.Context, _ []string) error {
			o, err := parseOutcome(outcome)
			if err != nil {
				return err
			}
			if namespace != "" {
				if err := checkNamespace(namespace); err != nil {
					return err
				}
			}
			switch {
			case edges && follow:
				return usagef("--edges cannot be followed: leave --follow out")
			case !edges && since != 0:
				return usagef("--since is for --edges; use --last")
			case since < 0:
				return usagef("--since %v: want 0 or more", since)
			}
			req := &symbolonv1.WatchFlowsRequest{Follow: follow, Outcome: o, Namespace: namespace, Last: last}
			if edges {
				return a.listEdges(ctx, req, since)
			}
			return a.watchFlows(ctx, req)
		}),
	}
	f := cmd.Flags()
	f.BoolVar(&follow, "follow", false, "go on with new records")
	f.StringVar(&outcome, "outcome", "", "only these: allow, deny, error")
	f.BoolVar(&edges, "edges", false, "show who reached whom, connections counted")
	f.DurationVar(&since, "since", 0, "with --edges: only those seen in so much of the past, such as 24h; 0: all")
	f.Uint32Var(&last, "last", 100, "so many records, or edges, of the past; 0: all that the controller has")
	cobra.CheckErr(cmd.RegisterFlagCompletionFunc("outcome", cobra.FixedCompletions(
		[]cobra.Completion{"allow", "deny", "error"}, cobra.ShellCompDirectiveNoFileComp)))
	a.namespaceFlag(cmd, &namespace, "only flows with an end in this namespace or below it")
	a.outputFlag(cmd, listFormats...)
	return cmd
}

func parseOutcome(s string) (symbolonv1.Outcome, error) {
	if s == "" {
		return symbolonv1.Outcome_OUTCOME_UNSPECIFIED, nil
	}
	n, ok := symbolonv1.Outcome_value["OUTCOME_"+strings.ToUpper(s)]
	if !ok || n == 0 {
		return 0, usagef("--outcome %q: want allow, deny or error", s)
	}
	return symbolonv1.Outcome(n), nil
}

func (a *app) watchFlows(ctx context.Context, req *symbolonv1.WatchFlowsRequest) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	interrupted := ctx
	if !req.GetFollow() {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, a.timeout)
		defer cancel()
	}
	stream, err := c.WatchFlows(ctx, connect.NewRequest(req))
	if err != nil {
		return err
	}
	defer func() { _ = stream.Close() }() // its error is Err's, below
	printer := a.flowPrinter(req.GetFollow())
	n := 0
	for stream.Receive() {
		msg := stream.Msg()
		if msg.GetLost() > 0 {
			a.warning("%d records are missing here: this reader was too slow", msg.GetLost())
		}
		if msg.GetRecord() == nil {
			continue
		}
		n++
		if err := printer.record(msg.GetRecord()); err != nil {
			return err
		}
	}
	if err := printer.end(); err != nil {
		return err
	}
	// An interrupt is how --follow ends.
	if err := stream.Err(); err != nil && !(req.GetFollow() && errors.Is(interrupted.Err(), context.Canceled)) {
		return err
	}
	if n == 0 && !req.GetFollow() {
		a.say("no such flows")
	}
	return nil
}

// flowPrinter writes records in the format of -o, each at once where live.
type flowPrinter struct {
	record func(*symbolonv1.FlowRecord) error
	end    func() error
}

func (a *app) flowPrinter(live bool) flowPrinter {
	nothing := func() error { return nil }
	switch a.output {
	case "json":
		return flowPrinter{func(r *symbolonv1.FlowRecord) error {
			doc, err := flowLine(r)
			if err != nil {
				return err
			}
			return a.write(append(doc, '\n'))
		}, nothing}
	case "yaml":
		return flowPrinter{func(r *symbolonv1.FlowRecord) error {
			doc, err := flowLine(r)
			if err != nil {
				return err
			}
			if err := a.write([]byte("---\n")); err != nil {
				return err
			}
			return a.writeYAML(doc)
		}, nothing}
	case "name":
		return flowPrinter{func(r *symbolonv1.FlowRecord) error {
			return a.write([]byte(sanitize(r.GetFlowId(), false) + "\n"))
		}, nothing}
	}
	t := a.newTable(a.output == "wide", "TIME", "SOURCE", "DESTINATION", "VERDICT", "REASON", "POLICY", "PROTECTION", "BYTES",
		"|", "DURATION", "SUITE", "FLOW ID", "REPORTER", "SOURCE ADDRESS", "DESTINATION ADDRESS", "WOULD", "DETAIL")
	if live {
		// Room for what usually comes, since rows cannot be aligned afterwards.
		copy(t.widths, []int{8, 24, 28, 7, 14, 24, 13})
	}
	started := false
	return flowPrinter{
		record: func(r *symbolonv1.FlowRecord) error {
			started = true
			t.row(a.flowCells(r)...)
			if live {
				return t.flush()
			}
			return nil
		},
		end: func() error {
			if !started || live {
				return nil
			}
			return t.flush()
		},
	}
}

// flowLine is the record as proxies write it to their own files: one form of a
// record, wherever it is read.
func flowLine(r *symbolonv1.FlowRecord) ([]byte, error) {
	doc, err := json.Marshal(flow.NewLine(r))
	if err != nil {
		return nil, fmt.Errorf("format JSON: %w", err)
	}
	return escapeJSON(doc), nil
}

func (a *app) flowCells(r *symbolonv1.FlowRecord) []cell {
	start, duration := "", ""
	if r.GetStart() != nil {
		start = r.GetStart().AsTime().In(a.Location).Format("15:04:05")
		if a.output == "wide" {
			start = absolute(a.Location, r.GetStart())
		}
		if r.GetEnd() != nil {
			duration = r.GetEnd().AsTime().Sub(r.GetStart().AsTime()).String()
		}
	}
	_, port, _ := net.SplitHostPort(r.GetDestination().GetAddress())
	destination := endName(r.GetDestination())
	if r.GetDestination().GetSpiffeId() != "" && port != "" {
		destination += ":" + port
	}
	suite := strings.TrimSpace(r.GetTlsVersion() + " " + r.GetCipherSuite() + " " + r.GetKeyExchange())
	if r.GetResumed() {
		suite += " resumed"
	}
	would := strings.TrimSpace(r.GetWouldVerdict() + " " + r.GetWouldPolicy())
	return []cell{
		text(start), text(endName(r.GetSource())), text(destination), outcomeCell(r.GetOutcome()),
		text(flowReason(r)), text(flowPolicy(r)), protectionCell(r),
		text(fmt.Sprintf("%s/%s", size(r.GetBytesSent()), size(r.GetBytesReceived()))),
		text(duration), text(suite), text(r.GetFlowId()), text(word(r.GetReporter()) + " " + r.GetHost()),
		text(r.GetSource().GetAddress()), text(r.GetDestination().GetAddress()), text(would), text(r.GetDetail()),
	}
}

// endName is the shortest true name of an end: identity, External or Service, address.
func endName(e *symbolonv1.FlowEndpoint) string {
	switch {
	case e.GetSpiffeId() != "":
		return shortID(e.GetSpiffeId())
	case e.GetExternal() != "":
		return fmt.Sprintf("%s (%s)", e.GetExternal(), e.GetAddress())
	default:
		return e.GetAddress()
	}
}

func outcomeCell(o symbolonv1.Outcome) cell {
	switch o {
	case symbolonv1.Outcome_OUTCOME_ALLOW:
		return yes("allow")
	case symbolonv1.Outcome_OUTCOME_DENY:
		return no("deny")
	case symbolonv1.Outcome_OUTCOME_ERROR:
		return warn("error")
	default:
		return text(word(o))
	}
}

func flowReason(r *symbolonv1.FlowRecord) string {
	s := word(r.GetReason())
	if peer := word(r.GetPeerReason()); peer != "" {
		s += " (" + peer + ")"
	}
	return s
}

// flowPolicy names the deciders: the client's side's, then the server's where it
// is another.
func flowPolicy(r *symbolonv1.FlowRecord) string {
	switch c, s := r.GetClientPolicy(), r.GetServerPolicy(); {
	case c == s || s == "":
		return c
	case c == "":
		return s
	default:
		return c + ", " + s
	}
}

func protectionCell(r *symbolonv1.FlowRecord) cell {
	s := word(r.GetProtection())
	switch {
	case r.GetLocal():
		return text(strings.TrimSpace("local " + s))
	case s == "" && r.GetOutcome() == symbolonv1.Outcome_OUTCOME_ALLOW:
		return cell{"none", yellow}
	case r.GetProtection() == symbolonv1.Protection_PROTECTION_ENCRYPTED:
		return cell{s, green}
	default:
		return text(s)
	}
}
