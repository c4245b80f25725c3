package store

import (
	"sort"
	"strings"
	"sync"
)

// Bounds of what is remembered for watchers; beyond them they list again.
const (
	historyEvents = 8192
	historyBytes  = 16 << 20
)

// history is the recent past: whole revisions only, so that a watcher never sees
// half a transaction.
type history struct {
	mu     sync.Mutex
	events []Event // in order of revision
	bytes  int
	// compacted is the last revision that is not, or not all, in events.
	compacted int64
	current   int64
	more      chan struct{} // closed and replaced at each change
}

func newHistory(rev int64) *history {
	return &history{compacted: rev, current: rev, more: make(chan struct{})}
}

func (h *history) add(rev int64, events []Event) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.current = rev
	h.events = append(h.events, events...)
	for _, e := range events {
		h.bytes += size(e)
	}
	drop := 0
	for drop < len(h.events) && (len(h.events)-drop > historyEvents || h.bytes > historyBytes) {
		first := h.events[drop].ModRevision
		for drop < len(h.events) && h.events[drop].ModRevision == first {
			h.bytes -= size(h.events[drop])
			drop++
		}
		h.compacted = first
	}
	if drop > 0 {
		h.events = append([]Event(nil), h.events[drop:]...)
	}
	close(h.more)
	h.more = make(chan struct{})
}

func size(e Event) int { return len(e.Key) + len(e.Value) }

// since returns the events with the prefix after a revision, the revision that
// they lead up to, and a channel that closes when there are more.
func (h *history) since(prefix string, after int64) (events []Event, upTo int64, more <-chan struct{}, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	// A revision of the future is of another life of this store, before a restore.
	if after < h.compacted || after > h.current {
		return nil, 0, nil, ErrCompacted
	}
	first := sort.Search(len(h.events), func(i int) bool { return h.events[i].ModRevision > after })
	for _, e := range h.events[first:] {
		if strings.HasPrefix(e.Key, prefix) {
			events = append(events, e)
		}
	}
	return events, h.current, h.more, nil
}
