package controller

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/federation"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/zap"

	"github.com/symbolon/symbolon/controller/store"
)

const (
	// A bundle is small, and there is nothing else to ask for: whoever takes longer is
	// cut off.
	endpointRead, endpointWrite, endpointIdle = 10 * time.Second, 20 * time.Second, 30 * time.Second
	// endpointConns bounds the connections at a time; anybody can make them.
	// endpointConnsPerAddress are those of one IPv4 address or IPv6 /64.
	endpointConns, endpointConnsPerAddress = 256, 32
	// certCheck is how often a web certificate's file is looked at.
	certCheck = time.Minute
)

// bundleSequence says which bundle the last sequence number was given to.
type bundleSequence struct {
	Sequence uint64 `json:"sequence"`
	Hash     []byte `json:"hash"`
}

// ownBundle is the controller's own trust domain as a SPIFFE bundle. Each change of its
// authorities has a sequence number greater than all before, also over restarts, and
// over a store that was restored from an old backup: it is no less than the time.
type ownBundle struct {
	domain spiffeid.TrustDomain
	roots  func() []*x509.Certificate
	hint   time.Duration
	store  store.Store
	now    func() time.Time

	mu   sync.Mutex
	last bundleSequence
}

// GetBundleForTrustDomain implements spiffebundle.Source.
func (o *ownBundle) GetBundleForTrustDomain(td spiffeid.TrustDomain) (*spiffebundle.Bundle, error) {
	if td != o.domain {
		return nil, fmt.Errorf("no bundle of %s is served here", td)
	}
	b := spiffebundle.FromX509Authorities(td, o.roots())
	sequence, err := o.sequence(b)
	if err != nil {
		return nil, err
	}
	b.SetRefreshHint(o.hint)
	b.SetSequenceNumber(sequence)
	return b, nil
}

func (o *ownBundle) sequence(b *spiffebundle.Bundle) (uint64, error) {
	var all [][]byte
	for _, root := range b.X509Authorities() {
		all = append(all, root.Raw)
	}
	slices.SortFunc(all, bytes.Compare)
	h := sha256.New()
	for _, der := range all {
		sum := sha256.Sum256(der)
		h.Write(sum[:])
	}
	hash := h.Sum(nil)
	o.mu.Lock()
	defer o.mu.Unlock()
	if bytes.Equal(o.last.Hash, hash) {
		return o.last.Sequence, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), endpointWrite)
	defer cancel()
	var kept bundleSequence
	cond := store.Cond{Key: keyBundleSequence}
	switch kv, err := o.store.Get(ctx, keyBundleSequence); {
	case errors.Is(err, store.ErrNotFound):
	case err != nil:
		return 0, err
	default:
		if err := getJSON(kv, &kept); err != nil {
			return 0, err
		}
		cond.ModRevision = kv.ModRevision
	}
	if !bytes.Equal(kept.Hash, hash) {
		kept = bundleSequence{max(kept.Sequence+1, uint64(max(o.now().Unix(), 0))), hash}
		op, err := putJSON(keyBundleSequence, kept)
		if err != nil {
			return 0, err
		}
		if _, ok, err := o.store.Txn(ctx, []store.Cond{cond}, []store.Op{op}); err != nil || !ok {
			return 0, errors.Join(err, fmt.Errorf("bundle: no sequence number now (stored: %t)", ok))
		}
	}
	o.last = kept
	return kept.Sequence, nil
}

// federate prepares what serves and fetches bundles, and listens if that is configured.
func (s *Server) federate() error {
	f := s.cfg.Federation
	s.ownBundle = &ownBundle{
		domain: s.cfg.trustDomain(), roots: s.ca.Roots, hint: f.RefreshHint, store: s.store, now: s.opts.Now,
	}
	roots, err := f.webRoots()
	if err != nil {
		return err
	}
	s.followers = &followers{server: s, web: roots, byName: make(map[string]*follower)}
	if f.Listen == "" {
		return nil
	}
	l, err := net.Listen("tcp", f.Listen)
	if err != nil {
		return fmt.Errorf("federation: %w", err)
	}
	if s.bundleEndpoint, err = s.newBundleEndpoint(l); err != nil {
		_ = l.Close()
		return err
	}
	s.federation = newBoundedListener(l, endpointConns, endpointConnsPerAddress)
	return nil
}

// newBundleEndpoint is the server of the bundle, for the configuration's listener.
func (s *Server) newBundleEndpoint(l net.Listener) (*http.Server, error) {
	handler, err := federation.NewHandler(s.cfg.trustDomain(), s.ownBundle)
	if err != nil {
		return nil, fmt.Errorf("federation: %w", err)
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12} // others' clients; what they get is public
	switch f := s.cfg.Federation; f.Profile {
	case profileWeb:
		web := &webCertificate{cert: f.CertFile, key: f.KeyFile, now: s.opts.Now}
		if _, err := web.get(nil); err != nil {
			return nil, err
		}
		config.GetCertificate = web.get
	default:
		names, addresses := serverNames(l.Addr().String(), s.cfg.Advertise)
		config.GetCertificate = s.ca.ServerCertificate(names, addresses).Get
	}
	return &http.Server{
		Handler: handler, TLSConfig: config, MaxHeaderBytes: maxHeader,
		ReadHeaderTimeout: endpointRead, ReadTimeout: endpointRead, WriteTimeout: endpointWrite, IdleTimeout: endpointIdle,
		ErrorLog: zap.NewStdLog(s.log.Named("federation")),
	}, nil
}

// webCertificate is a certificate in files that somebody else renews.
type webCertificate struct {
	cert, key string
	now       func() time.Time

	mu      sync.Mutex
	current *tls.Certificate
	checked time.Time
	changed [2]time.Time // of the files
}

// get is for tls.Config.GetCertificate. While the files cannot be read, the last
// certificate is served.
func (w *webCertificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := w.now()
	if w.current != nil && now.Sub(w.checked).Abs() < certCheck {
		return w.current, nil
	}
	w.checked = now
	var changed [2]time.Time
	for i, file := range []string{w.cert, w.key} {
		if st, err := os.Stat(file); err == nil {
			changed[i] = st.ModTime()
		}
	}
	if w.current != nil && changed == w.changed {
		return w.current, nil
	}
	c, err := tls.LoadX509KeyPair(w.cert, w.key)
	if err != nil {
		if w.current != nil {
			return w.current, nil
		}
		return nil, fmt.Errorf("federation: cert_file and key_file: %w", err)
	}
	w.current, w.changed = &c, changed
	return w.current, nil
}

// boundedListener accepts so many connections at a time; others wait in the backlog. So
// many of them are one address's; it closes what is beyond, so that nobody else waits for it.
type boundedListener struct {
	net.Listener
	places     chan struct{}
	perAddress int
	closed     chan struct{}
	once       sync.Once

	mu   sync.Mutex
	from map[netip.Prefix]int
}

func newBoundedListener(l net.Listener, n, perAddress int) *boundedListener {
	return &boundedListener{
		Listener: l, places: make(chan struct{}, n), perAddress: perAddress, closed: make(chan struct{}), from: make(map[netip.Prefix]int),
	}
}

// enter counts a connection of an address's; false: it has too many.
func (b *boundedListener) enter(of netip.Prefix) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.from[of] >= b.perAddress {
		return false
	}
	b.from[of]++
	return true
}

func (b *boundedListener) leave(of netip.Prefix) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.from[of]--; b.from[of] == 0 {
		delete(b.from, of)
	}
}

// Accept waits for a place first.
func (b *boundedListener) Accept() (net.Conn, error) {
	select {
	case b.places <- struct{}{}:
	case <-b.closed:
		return nil, net.ErrClosed
	}
	for {
		c, err := b.Listener.Accept()
		if err != nil {
			<-b.places
			return nil, err
		}
		of := addressGroup(c.RemoteAddr())
		if !b.enter(of) {
			_ = c.Close()
			continue
		}
		return &boundedConn{Conn: c, leave: sync.OnceFunc(func() { b.leave(of); <-b.places })}, nil
	}
}

// addressGroup is who counts as one: an IPv4 address, an IPv6 /64.
func addressGroup(a net.Addr) netip.Prefix {
	at, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return netip.Prefix{}
	}
	ip := at.Addr().Unmap().WithZone("")
	bits := ip.BitLen()
	if ip.Is6() {
		bits = 64
	}
	p, _ := ip.Prefix(bits) // of a valid length
	return p
}

// Close also ends an Accept that waits for a place.
func (b *boundedListener) Close() error {
	b.once.Do(func() { close(b.closed) })
	return b.Listener.Close()
}

type boundedConn struct {
	net.Conn
	leave func()
}

// Close gives the place back.
func (c *boundedConn) Close() error {
	defer c.leave()
	return c.Conn.Close()
}
