package identity

import (
	"context"
	"slices"
	"time"
)

// Refresh is w as it would be found now, by what the user database and its container's
// runtime say now; w itself if that is the same. Nothing else of a workload changes under
// one key.
func (r *Resolver) Refresh(w *Workload) *Workload {
	if w.Attributes.Has("container.id") {
		return r.refreshContainer(w) // its users are not this host's
	}
	u, _, err := r.users.lookup(w.Key.UID)
	if err != nil {
		return w // who connects next is told
	}
	m := map[string][]string{"os.group": u.groups}
	if u.name != "" {
		m["os.user"] = []string{u.name}
	}
	now := w.Attributes.Filter(func(k string) bool { return k != "os.user" && k != "os.group" }).Union(NewAttributes(m))
	if slices.Equal(now, w.Attributes) {
		return w
	}
	return &Workload{Key: w.Key, Attributes: now}
}

// WatchUsers looks at the user database so often, until ctx ends, and calls changed
// when it is another: the time for Manager.Refresh. Looking is two calls of stat(2).
func (r *Resolver) WatchUsers(ctx context.Context, every time.Duration, changed func()) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	_, was, _ := r.users.lookup(0)
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if _, serial, err := r.users.lookup(0); err == nil && serial != was {
			was = serial
			changed()
		}
	}
}
