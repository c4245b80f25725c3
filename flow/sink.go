package flow

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

const (
	// writerQueue is how many records wait for a slow writer before some are lost.
	writerQueue = 4096
	// writerBytes is how much is written at once, and writerRest how long more may
	// gather before: to wake a writer for each record costs more than the record.
	writerBytes = 64 << 10
	writerRest  = 10 * time.Millisecond
	// reporterQueue is how many records wait for the controller.
	reporterQueue = 16384
	// reporterBatch is the most that one report carries.
	reporterBatch = 1024
	// reporterBytes is the same in bytes of protobuf, well below what the
	// controller takes.
	reporterBytes = 1 << 20
	// closeGrace is how long Close waits for a writer that does not.
	closeGrace = 2 * time.Second
	// reportEvery is how long a record waits for others to travel with.
	reportEvery = time.Second
)

// Sink takes finished records. Record never blocks; the record is not changed
// afterwards by either side.
type Sink interface {
	Record(*symbolonv1.FlowRecord)
}

// Tee gives each record to every sink.
type Tee []Sink

// Record implements Sink.
func (t Tee) Record(r *symbolonv1.FlowRecord) {
	for _, s := range t {
		s.Record(r)
	}
}

// Writer writes each record as a line of JSON.
type Writer struct {
	queue chan *symbolonv1.FlowRecord
	done  chan struct{}
	lost  atomic.Uint64
	once  sync.Once
}

// NewWriter starts writing to w, which it does not close. onError hears of the
// first failed write after each successful one.
func NewWriter(w io.Writer, onError func(error)) *Writer {
	x := &Writer{queue: make(chan *symbolonv1.FlowRecord, writerQueue), done: make(chan struct{})}
	go x.run(w, onError)
	return x
}

func (w *Writer) run(out io.Writer, onError func(error)) {
	defer close(w.done)
	failed, torn := false, false
	var lines []byte
	for r := range w.queue {
		b := lines[:0]
		if torn { // a full disk took half a line: the next one must not continue it
			b = append(b, '\n')
		}
		first := len(b)
		b = w.gather(appendLine(b, r))
		n, err := out.Write(b)
		if n > 0 {
			torn = b[n-1] != '\n'
		}
		if err != nil {
			w.lost.Add(uint64(bytes.Count(b[max(n, first):], []byte{'\n'})))
			if !failed {
				onError(err)
			}
		}
		failed = err != nil
		if lines = b; cap(b) > 2*writerBytes {
			lines = nil
		}
		if len(w.queue) == 0 {
			time.Sleep(writerRest)
		}
	}
}

// gather appends to b the records that wait, as long as there is room.
func (w *Writer) gather(b []byte) []byte {
	for len(b) < writerBytes {
		select {
		case r, ok := <-w.queue:
			if !ok {
				return b
			}
			b = appendLine(b, r)
		default:
			return b
		}
	}
	return b
}

// Record implements Sink.
func (w *Writer) Record(r *symbolonv1.FlowRecord) {
	select {
	case w.queue <- r:
	default:
		w.lost.Add(1)
	}
}

// Lost counts the records that were not written.
func (w *Writer) Lost() uint64 { return w.lost.Load() }

// Close writes what is queued, unless that takes longer than two seconds: a reader
// that has stopped reading must not keep the program from stopping. Record must not
// be called any more.
func (w *Writer) Close() {
	w.once.Do(func() { close(w.queue) })
	timer := time.NewTimer(closeGrace)
	defer timer.Stop()
	select {
	case <-w.done:
	case <-timer.C:
	}
}

// Reporter sends records to the controller in batches, and beside them edges. While
// the controller is away it keeps the newest reporterQueue records; edges go on
// gathering.
type Reporter struct {
	send  func(context.Context, *symbolonv1.ReportFlowsRequest) error
	edges *edges

	mu    sync.Mutex
	queue []*symbolonv1.FlowRecord
	lost  uint64 // since the last report that arrived
	total uint64
	limit int // records a batch, less while one is looked for that is at fault
}

// ErrUnacceptable is what send wraps where trying the same batch again cannot help.
var ErrUnacceptable = errors.New("the controller does not take the records")

// NewReporter reports through send, which returns when the batch has arrived or
// cannot. Run does the work.
func NewReporter(send func(context.Context, *symbolonv1.ReportFlowsRequest) error) *Reporter {
	return &Reporter{send: send, edges: newEdges(), limit: reporterBatch}
}

// Record implements Sink.
func (r *Reporter) Record(rec *symbolonv1.FlowRecord) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.queue) >= reporterQueue {
		n := copy(r.queue, r.queue[reporterBatch:]) // the oldest go, a batch at a time
		clear(r.queue[n:])
		r.queue = r.queue[:n]
		r.lost += reporterBatch
		r.total += reporterBatch
	}
	r.queue = append(r.queue, rec)
}

// Lost counts the records that never reached the controller.
func (r *Reporter) Lost() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.total
}

// Run reports until ctx ends, and once more then, within grace.
func (r *Reporter) Run(ctx context.Context, grace time.Duration) {
	tick := time.NewTicker(reportEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
			defer cancel()
			for r.flush(last) {
			}
			for r.flushEdges(last, true) {
			}
			return
		case <-tick.C:
			for r.flush(ctx) {
			}
			for r.flushEdges(ctx, false) {
			}
		}
	}
}

// flush sends one batch; true: there may be more to send now.
func (r *Reporter) flush(ctx context.Context) bool {
	batch, more := r.next()
	if len(batch.GetRecords()) == 0 && batch.GetLost() == 0 {
		return false
	}
	err := r.send(ctx, batch)
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case err == nil:
		r.limit = min(2*r.limit, reporterBatch)
		return more
	case !errors.Is(err, ErrUnacceptable):
		r.putBack(batch)
		return false
	case len(batch.GetRecords()) > 1:
		// One of them is at fault: halve until it is alone.
		r.limit = len(batch.GetRecords()) / 2
		r.putBack(batch)
		return true
	default:
		// The limit stays: where one is at fault, the next may be too, and where they
		// are not it soon doubles.
		r.lost += batch.GetLost() + uint64(len(batch.GetRecords()))
		r.total += uint64(len(batch.GetRecords()))
		return more && len(batch.GetRecords()) > 0
	}
}

// next takes a batch from the queue, bounded in records and bytes.
func (r *Reporter) next() (batch *symbolonv1.ReportFlowsRequest, more bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	n, size := 0, 0
	for n < min(len(r.queue), r.limit) {
		if size += proto.Size(r.queue[n]); size > reporterBytes && n > 0 {
			break
		}
		n++
	}
	batch = &symbolonv1.ReportFlowsRequest{Records: r.queue[:n:n], Lost: r.lost}
	r.queue = append([]*symbolonv1.FlowRecord(nil), r.queue[n:]...)
	r.lost = 0
	return batch, len(r.queue) > 0
}

// putBack puts a batch in front of the queue again; what no longer fits is lost.
func (r *Reporter) putBack(batch *symbolonv1.ReportFlowsRequest) {
	r.lost += batch.GetLost()
	keep := batch.GetRecords()
	if over := len(keep) + len(r.queue) - reporterQueue; over > 0 {
		over = min(over, len(keep))
		keep = keep[over:]
		r.lost += uint64(over)
		r.total += uint64(over)
	}
	r.queue = append(append([]*symbolonv1.FlowRecord(nil), keep...), r.queue...)
}
