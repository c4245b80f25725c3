package flow

import (
	"context"
	"errors"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// maxText bounds a name in an edge, bytes.
const maxText = 512

// Observe implements EdgeSink: what a Reporter is told travels beside its records.
func (r *Reporter) Observe(o Observation) { r.edges.observe(o) }

// EdgesLost counts the connections that are in no edge that reached the controller,
// for want of room or because the controller refused it.
func (r *Reporter) EdgesLost() uint64 {
	r.edges.mu.Lock()
	defer r.edges.mu.Unlock()
	return r.edges.total
}

// flushEdges sends what is due, or all, one batch; true: there may be more to send
// now.
func (r *Reporter) flushEdges(ctx context.Context, all bool) bool {
	batch := r.edges.next(time.Now(), all)
	if batch == nil {
		return false
	}
	err := r.send(ctx, &symbolonv1.ReportFlowsRequest{Edges: &batch.set, EdgesLost: batch.lost})
	switch {
	case err == nil:
		return len(batch.edges) > 0
	case errors.Is(err, ErrUnacceptable):
		r.edges.drop(batch)
		return false
	}
	r.edges.putBack(batch, time.Now())
	return false
}
