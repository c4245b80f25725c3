package controller

import (
	"context"
	"time"

	"connectrpc.com/connect"
	"go.uber.org/zap"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// ReportFlows takes a batch of records of the calling host. Those that are refused
// count as lost.
func (s proxyService) ReportFlows(ctx context.Context, req *connect.Request[symbolonv1.ReportFlowsRequest]) (*connect.Response[symbolonv1.ReportFlowsResponse], error) {
	host := hostOf(ctx)
	// Whoever has its key would say what he likes of who talks to whom.
	if err := s.refuseRevoked(host.ID, "", nil); err != nil {
		return nil, err
	}
	var taken []*symbolonv1.FlowRecord
	var why error
	for _, r := range req.Msg.GetRecords() {
		if err := takeFlow(r, host, s.cfg.trustDomain()); err != nil {
			why = err
			continue
		}
		taken = append(taken, r)
	}
	refused := len(req.Msg.GetRecords()) - len(taken)
	if refused > 0 {
		s.log.Warn("flow records refused", zap.String("host", host.ID), zap.Int("refused", refused), zap.NamedError("last", why))
	}
	s.flows.add(host.ID, taken, req.Msg.GetLost(), uint64(refused))
	s.takeEdges(host, req.Msg)
	return connect.NewResponse(&symbolonv1.ReportFlowsResponse{}), nil
}

type flowStream = connect.ServerStream[symbolonv1.WatchFlowsResponse]

// WatchFlows replays what is kept, then follows.
func (s adminService) WatchFlows(ctx context.Context, req *connect.Request[symbolonv1.WatchFlowsRequest], stream *flowStream) error {
	records, next, _, more := s.flows.since(0)
	wanted := records[:0]
	for _, r := range records {
		if flowMatches(r, req.Msg) {
			wanted = append(wanted, r)
		}
	}
	if last := int(req.Msg.GetLast()); last > 0 && last < len(wanted) {
		wanted = wanted[len(wanted)-last:]
	}
	if err := sendFlows(ctx, stream, wanted, req.Msg, 0); err != nil {
		return err
	}
	for req.Msg.GetFollow() {
		select {
		case <-more:
		case <-s.stopping:
			return errShuttingDown
		case <-ctx.Done():
			return ctx.Err()
		}
		var gone uint64
		records, next, gone, more = s.flows.since(next)
		if err := sendFlows(ctx, stream, records, req.Msg, gone); err != nil {
			return err
		}
	}
	return nil
}

// sendFlows sends those that match. Records are shared: they are only read.
func sendFlows(ctx context.Context, stream *flowStream, records []*symbolonv1.FlowRecord, want *symbolonv1.WatchFlowsRequest, lost uint64) error {
	response := callOf(ctx).response
	if err := response.SetWriteDeadline(time.Now().Add(sendTimeout)); err != nil {
		return connect.NewError(connect.CodeInternal, err)
	}
	for _, r := range records {
		if !flowMatches(r, want) {
			continue
		}
		if err := stream.Send(&symbolonv1.WatchFlowsResponse{Record: r, Lost: lost}); err != nil {
			return err
		}
		lost = 0
	}
	if lost > 0 { // none of the rest matched, but the watcher should know
		if err := stream.Send(&symbolonv1.WatchFlowsResponse{Lost: lost}); err != nil {
			return err
		}
	}
	if err := response.SetWriteDeadline(time.Time{}); err != nil {
		return connect.NewError(connect.CodeInternal, err)
	}
	return nil
}

func flowMatches(r *symbolonv1.FlowRecord, want *symbolonv1.WatchFlowsRequest) bool {
	if o := want.GetOutcome(); o != symbolonv1.Outcome_OUTCOME_UNSPECIFIED && r.GetOutcome() != o {
		return false
	}
	ns := want.GetNamespace()
	return ns == "" || endWithin(r.GetSource(), ns) || endWithin(r.GetDestination(), ns)
}

func endWithin(e *symbolonv1.FlowEndpoint, namespace string) bool {
	return e.GetNamespace() != "" && within(e.GetNamespace(), namespace)
}
