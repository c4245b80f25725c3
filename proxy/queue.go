package proxy

import (
	"container/heap"
	"time"
)

// timed is what a queue orders. spot is where the queue notes its place: 0, not in it.
type timed interface {
	when() time.Time
	spot() *int
}

// queue has first what comes first, and knows where each is. Not safe for concurrent
// use.
type queue[T timed] struct{ items byTime[T] }

// put places x by its time, also if that has changed; one without a time is left out.
func (q *queue[T]) put(x T) {
	at := *x.spot()
	switch {
	case x.when().IsZero():
		q.drop(x)
	case at == 0:
		heap.Push(&q.items, x)
	default:
		heap.Fix(&q.items, at-1)
	}
}

// drop takes x out, if it is there.
func (q *queue[T]) drop(x T) {
	if at := *x.spot(); at > 0 {
		heap.Remove(&q.items, at-1)
	}
}

// due takes out the first if its time has come.
func (q *queue[T]) due(now time.Time) (x T, ok bool) {
	if len(q.items) == 0 || !past(q.items[0].when(), now) {
		return x, false
	}
	return heap.Pop(&q.items).(T), true
}

// byTime implements heap.Interface.
type byTime[T timed] []T

func (b byTime[T]) Len() int           { return len(b) }
func (b byTime[T]) Less(i, j int) bool { return b[i].when().Before(b[j].when()) }

func (b byTime[T]) Swap(i, j int) {
	b[i], b[j] = b[j], b[i]
	*b[i].spot(), *b[j].spot() = i+1, j+1
}

func (b *byTime[T]) Push(x any) {
	*b = append(*b, x.(T))
	*x.(T).spot() = len(*b)
}

func (b *byTime[T]) Pop() any {
	last := len(*b) - 1
	x := (*b)[last]
	*x.spot() = 0
	var none T
	(*b)[last] = none
	*b = (*b)[:last]
	return x
}
