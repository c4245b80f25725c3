package controller

import "container/list"

// edgeRoom is edges of one namespace that share a bound, by the host that reported each
// of them first. Not safe for concurrent use.
type edgeRoom struct {
	byHost map[string]*list.List // the last seen last
	size   int
}

func newEdgeRoom() *edgeRoom { return &edgeRoom{byHost: make(map[string]*list.List)} }

func (m *edgeRoom) add(r *edgeRecord) {
	l := m.byHost[r.host]
	if l == nil {
		l = list.New()
		m.byHost[r.host] = l
	}
	r.in, r.element = m, l.PushBack(r)
	m.size++
}

func (m *edgeRoom) seen(r *edgeRecord) { m.byHost[r.host].MoveToBack(r.element) }

func (m *edgeRoom) remove(r *edgeRecord) {
	l := m.byHost[r.host]
	l.Remove(r.element)
	if m.size--; l.Len() == 0 {
		delete(m.byHost, r.host)
	}
}

// leaves is who makes room: of the host that has the most, the edge that was not seen for
// the longest. So a host that makes edges up can push out its own, and no other's that
// has fewer.
func (m *edgeRoom) leaves() *edgeRecord {
	var most *list.List
	var oldest *edgeRecord
	for _, l := range m.byHost {
		r := l.Front().Value.(*edgeRecord)
		if most == nil || l.Len() > most.Len() || l.Len() == most.Len() && r.edge.GetLast().AsTime().Before(oldest.edge.GetLast().AsTime()) {
			most, oldest = l, r
		}
	}
	return oldest
}
