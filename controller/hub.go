package controller

import (
	"crypto/sha256"
	"encoding/binary"
	"maps"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/policydb"
)

// publishDelay gathers generations that follow close on each other into one push.
const publishDelay = 75 * time.Millisecond

// distribution is one generation, ready to be sent to any host. What hosts of one
// namespace see is put together and encoded once.
type distribution struct {
	snapshot           *policydb.Snapshot
	profilesGeneration uint64
	bundle             [][]byte
	bundleVersion      uint64
	tokenKeys          []*symbolonv1.TokenKey
	// bundles are those of other trust domains. They change without a generation, so
	// distributions have a number of their own.
	bundles []*symbolonv1.TrustBundle
	serial  uint64

	mu   sync.Mutex
	sets map[string]*visibleSet // by the hosts' namespace
}

// visibleSet is what the hosts of one namespace get, but for their own attributes.
type visibleSet struct {
	// encoded is a Generation message without host_attributes and peers.
	encoded []byte
	// profiles is a hash of the Profiles in it: SVIDs depend on them.
	profiles [sha256.Size]byte
	// needsPeers: one of the namespaces that the hosts' workloads may be in is in learn, or
	// an External has names: those must not lead past a proxy.
	needsPeers bool
}

func (d *distribution) generation() uint64 { return d.snapshot.Generation() }

// newer tells whether d is to follow e.
func (d *distribution) newer(e *distribution) bool {
	return d.generation() > e.generation() || d.generation() == e.generation() && d.serial > e.serial
}

func (d *distribution) visibleTo(namespace string) (*visibleSet, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if set := d.sets[namespace]; set != nil {
		return set, nil
	}
	resources := d.snapshot.VisibleTo(namespace)
	encoded, err := proto.Marshal(&symbolonv1.Generation{
		Number: d.generation(), HostNamespace: namespace, Resources: resources, Bundle: d.bundle, BundleVersion: d.bundleVersion, Bundles: d.bundles, TokenKeys: d.tokenKeys,
	})
	if err != nil {
		return nil, err
	}
	set := &visibleSet{encoded: encoded}
	h := sha256.New()
	for _, r := range resources {
		if r.GetNamespaceKind().GetMode() == symbolonv1.Mode_MODE_LEARN && within(r.GetNamespace(), namespace) {
			set.needsPeers = true
		}
		if len(r.GetExternal().GetAddresses().GetFqdns()) > 0 {
			set.needsPeers = true
		}
		if ns := r.GetNamespace(); r.GetProfile() == nil || !within(ns, namespace) && !within(namespace, ns) {
			continue // the last: a Profile of elsewhere, by which peers are known
		}
		b, err := proto.MarshalOptions{Deterministic: true}.Marshal(r)
		if err != nil {
			return nil, err
		}
		h.Write(binary.BigEndian.AppendUint32(nil, uint32(len(b))))
		h.Write(b)
	}
	set.profiles = [sha256.Size]byte(h.Sum(nil))
	if d.sets == nil {
		d.sets = make(map[string]*visibleSet)
	}
	d.sets[namespace] = set
	return set, nil
}

// message is the Generation for one host, with the peers it should know. The shared part goes in as it was
// encoded, as fields that this message does not know: protobuf writes them out
// unchanged, and the receiver reads one whole message.
func (v *visibleSet) message(host *hostRecord, peers *peerSet, revoked *symbolonv1.Revocations) *symbolonv1.SessionResponse {
	g := &symbolonv1.Generation{HostAttributes: host.attributes().Proto(), Revocations: revoked}
	if v.needsPeers {
		g.Peers = peers.addresses
	}
	g.ProtoReflect().SetUnknown(v.encoded)
	return &symbolonv1.SessionResponse{Message: &symbolonv1.SessionResponse_Generation{Generation: g}}
}

// presence is what is known of a host while it is connected, and of the last time.
type presence struct {
	connected bool
	lastSeen  time.Time
	// acked is the generation in force on the host, refusal why it refused another.
	acked     uint64
	refusal   string
	version   string
	addresses []string
	// revocations is the number that the host has acknowledged.
	revocations uint64
}

// attachment is one session's place in the hub.
type attachment struct {
	hostID string
	// cut is closed to end the session, after reason was set.
	cut    chan struct{}
	reason error
	// reissue has room for one word: the host is to have its SVIDs issued anew.
	reissue chan struct{}
}

// anew says that word, unless it is said already.
func (a *attachment) anew() {
	select {
	case a.reissue <- struct{}{}:
	default:
	}
}

// hub knows the generation that hosts should have, and the hosts that are there.
type hub struct {
	now func() time.Time

	mu       sync.Mutex
	current  *distribution
	next     *distribution
	timer    *time.Timer
	changed  chan struct{} // closed and replaced when current changes
	sessions map[string]*attachment
	hosts    map[string]*presence
	closed   error
}

func newHub(now func() time.Time, first *distribution) *hub {
	return &hub{
		now: now, current: first, changed: make(chan struct{}),
		sessions: make(map[string]*attachment), hosts: make(map[string]*presence),
	}
}

// publish makes d what hosts should have, a moment later; d replaces one that is
// still waiting. The moment is not put off again: a stream of changes cannot hold
// back all of them.
func (h *hub) publish(d *distribution) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.current.newer(d) || h.next != nil && h.next.newer(d) {
		return // of two changes at once, the later got here first
	}
	h.next = d
	if h.timer == nil && h.closed == nil {
		h.timer = time.AfterFunc(publishDelay, h.flush)
	}
}

func (h *hub) flush() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.timer = nil
	if h.next == nil || h.closed != nil {
		return
	}
	h.current, h.next = h.next, nil
	close(h.changed)
	h.changed = make(chan struct{})
}

// wanted is what hosts should have now, and a channel that closes when that changes.
// A session that starts need not wait for what waits for others.
func (h *hub) wanted(starting bool) (*distribution, <-chan struct{}) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if starting && h.next != nil {
		return h.next, h.changed
	}
	return h.current, h.changed
}

// attach enters a session; an older one of the same host is cut: the host has
// given it up, even if we have not noticed yet.
func (h *hub) attach(hostID string, hello *symbolonv1.Hello) (*attachment, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed != nil {
		return nil, h.closed
	}
	if old := h.sessions[hostID]; old != nil {
		h.end(old, errReplaced)
	}
	a := &attachment{hostID: hostID, cut: make(chan struct{}), reissue: make(chan struct{}, 1)}
	h.sessions[hostID] = a
	h.hosts[hostID] = &presence{
		connected: true, lastSeen: h.now(), acked: hello.GetGeneration(),
		version: hello.GetVersion(), addresses: hello.GetAddresses(),
	}
	return a, nil
}

// detach leaves; what is known of the host stays.
func (h *hub) detach(a *attachment) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.sessions[a.hostID] != a {
		return
	}
	delete(h.sessions, a.hostID)
	if p := h.hosts[a.hostID]; p != nil {
		p.connected, p.lastSeen = false, h.now()
	}
}

// end is called with the lock held.
func (h *hub) end(a *attachment, reason error) {
	if h.sessions[a.hostID] == a {
		delete(h.sessions, a.hostID)
	}
	if p := h.hosts[a.hostID]; p != nil {
		p.connected, p.lastSeen = false, h.now()
	}
	a.reason = reason
	close(a.cut)
}

// acknowledged notes what a host said of a generation.
func (h *hub) acknowledged(hostID string, generation uint64, refusal string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	p := h.hosts[hostID]
	if p == nil {
		return
	}
	p.lastSeen, p.refusal = h.now(), refusal
	if refusal == "" {
		p.acked = generation
	}
}

// heardOfRevocations notes what a host has in force.
func (h *hub) heardOfRevocations(hostID string, number uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if p := h.hosts[hostID]; p != nil {
		p.lastSeen, p.revocations = h.now(), number
	}
}

// withoutRevocations are the connected hosts that have not acknowledged a number.
func (h *hub) withoutRevocations(number uint64) []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	var out []string
	for id := range h.sessions {
		if p := h.hosts[id]; p == nil || p.revocations != number {
			out = append(out, id)
		}
	}
	slices.Sort(out)
	return out
}

// remove cuts a host's session and forgets it.
func (h *hub) remove(hostID string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if a := h.sessions[hostID]; a != nil {
		h.end(a, errRemoved(hostID))
	}
	delete(h.hosts, hostID)
}

// reissue tells the hosts that are here to have their SVIDs issued anew.
func (h *hub) reissue(hosts []string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, id := range hosts {
		if a := h.sessions[id]; a != nil {
			a.anew()
		}
	}
}

// seen are the IDs of the hosts that were here since the start.
func (h *hub) seen() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Collect(maps.Keys(h.hosts))
}

// presence returns a copy; the zero value for a host that was not seen since start.
func (h *hub) presence(hostID string) presence {
	h.mu.Lock()
	defer h.mu.Unlock()
	p := h.hosts[hostID]
	if p == nil {
		return presence{}
	}
	out := *p
	if out.connected {
		// The connection is probed (server.go): it is not there without its host.
		out.lastSeen = h.now()
	}
	return out
}

func (h *hub) connected() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.sessions)
}

// close cuts all sessions and admits no more.
func (h *hub) close(reason error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = reason
	if h.timer != nil {
		h.timer.Stop()
		h.timer = nil
	}
	for _, a := range h.sessions {
		h.end(a, reason)
	}
}
