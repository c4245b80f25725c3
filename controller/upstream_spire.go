package controller

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"sync"
	"time"

	"connectrpc.com/connect"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/zap"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/controller/upstream"
	"github.com/symbolon/symbolon/identity"
)

const (
	// After a failure, the SPIRE server is asked again so soon; at first, and at most.
	upstreamRetry, upstreamRetryMax = 2 * time.Second, time.Minute
	// upstreamCheck is how late a step of the clock is noticed.
	upstreamCheck = time.Minute
)

// upstreamSPIRE is the SPIRE server below which this controller signs, and how it is with
// it.
type upstreamSPIRE struct {
	*upstream.SPIRE
	cancel context.CancelFunc
	done   chan struct{}

	mu    sync.Mutex
	err   error // of the last request to the server; nil: it was answered, or there was none
	since time.Time
	asked time.Time // when it answered last, in this process
}

// openUpstream begins to follow the SPIRE agent; nil: none is configured.
func (s *Server) openUpstream() (*upstreamSPIRE, error) {
	c := s.cfg.CA
	if c.UpstreamSPIREServer == "" {
		return nil, nil
	}
	u := &upstreamSPIRE{done: make(chan struct{})}
	var err error
	u.SPIRE, err = upstream.New(upstream.Options{
		TrustDomain: s.cfg.trustDomain(), WorkloadAPI: c.UpstreamSPIREWorkloadAPI, Server: c.UpstreamSPIREServer,
		Report: func(err error) {
			if err == nil {
				s.log.Info("the SPIRE agent answers")
				return
			}
			s.log.Warn("the SPIRE agent gives nothing newer; what there is stays in force until it ends", zap.Error(err))
		},
	})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	u.cancel = cancel
	go func() {
		defer close(u.done)
		u.Run(ctx)
	}()
	return u, nil
}

func (u *upstreamSPIRE) close() {
	if u == nil {
		return
	}
	u.cancel()
	<-u.done
	u.Close()
}

// note keeps what came of a request.
func (u *upstreamSPIRE) note(err error, now time.Time) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if (u.err == nil) != (err == nil) {
		u.since = now
	}
	if u.err = err; err == nil {
		u.asked = now
	}
}

// followUpstream takes over SPIRE's roots as they change, and has the intermediate renewed
// in time. While that fails, what is valid stays in force.
func (s *Server) followUpstream(ctx context.Context) {
	_, version := s.ca.Trust()
	retry := upstreamRetry
	for ctx.Err() == nil {
		roots, changed := s.upstream.Roots()
		if len(roots) > 0 {
			if _, err := s.ca.SetRoots(ctx, roots); err != nil {
				s.log.Error("SPIRE's roots are not taken over", zap.Error(err))
			}
		}
		was := s.ca.Status()
		err := s.ca.Renew(ctx)
		is := s.ca.Status()
		if renewed := !is.Intermediate.Equal(was.Intermediate); renewed || err != nil {
			s.upstream.note(err, s.opts.Now())
			if err == nil {
				if was.Stranded { // what it has signed is believed by nobody
					s.hub.reissue(s.hub.seen())
				}
				s.log.Info("SPIRE has signed another intermediate", zap.Stringer("serial", identity.SerialOf(is.Intermediate)), zap.Time("not_after", is.Intermediate.NotAfter))
			} else if ctx.Err() == nil {
				s.log.Warn("the intermediate is not renewed; what there is signs on until it ends", zap.Time("not_after", is.Intermediate.NotAfter), zap.Error(err))
			}
		}
		if _, now := s.ca.Trust(); now != version {
			version = now
			s.upstreamRootsChanged()
		}
		wait := min(is.Renewal.Sub(s.opts.Now()), upstreamCheck)
		if err != nil {
			wait, retry = retry, min(2*retry, upstreamRetryMax)
		} else {
			retry = upstreamRetry
		}
		select {
		case <-changed:
		case <-time.After(max(wait, time.Second)):
		case <-ctx.Done():
		}
	}
}

// upstreamRootsChanged tells everybody.
func (s *Server) upstreamRootsChanged() {
	s.rotating.Lock()
	defer s.rotating.Unlock()
	if err := s.writeRoots(); err != nil {
		s.log.Error("ca.pem is not what it should be; the next start writes it", zap.Error(err))
	}
	_, version := s.ca.Trust()
	s.log.Info("SPIRE's roots have changed", zap.Int("roots", len(s.ca.Roots())), zap.Uint64("bundle_version", version), zap.String("ca_pin", s.ca.Pin()))
	s.hub.publish(s.policies.distribution())
}

// refuseForged refuses a host's certificate that this controller has not signed. Below
// SPIRE's root there are others who could, by an entry of that name: SPIRE's operators are
// trusted with everything, but a mistake should not make a host.
func (s *Server) refuseForged(serial identity.Serial, hostID string) error {
	if s.upstream == nil || serial.IssuedTo(hostID) {
		return nil
	}
	return connect.NewError(connect.CodePermissionDenied, fmt.Errorf("the certificate of host %s is none of this controller's: enrol", hostID))
}

// proto is how it is, for people.
func (u *upstreamSPIRE) proto(server, workloadAPI string) *symbolonv1.UpstreamSPIRE {
	out := &symbolonv1.UpstreamSPIRE{Server: server, WorkloadApi: workloadAPI}
	since, err := u.Agent()
	out.AgentSince = moment(since)
	if err != nil {
		out.AgentError = err.Error()
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	out.Answered = moment(u.asked)
	if u.err != nil {
		out.Error, out.FailingSince = u.err.Error(), moment(u.since)
	}
	return out
}

func (c CAConfig) validateUpstreamSPIRE(td string, bad func(key, format string, args ...any)) {
	const api, server = "ca.upstream_spire_workload_api", "ca.upstream_spire_server"
	if c.UpstreamSPIREServer == "" && c.UpstreamSPIREWorkloadAPI == "" {
		return
	}
	if c.UpstreamSPIREServer == "" || c.UpstreamSPIREWorkloadAPI == "" {
		bad(server, "it goes with %s; give both, or neither to have a CA made", api)
		return
	}
	if err := upstream.ValidateWorkloadAPI(c.UpstreamSPIREWorkloadAPI); err != nil {
		bad(api, "%q: %v; such as unix:///run/spire/agent/api.sock", c.UpstreamSPIREWorkloadAPI, err)
	}
	if err := hostPort(c.UpstreamSPIREServer); err != nil {
		bad(server, "%q is not address:port; such as 198.51.100.5:8081", c.UpstreamSPIREServer)
	}
	if c.UpstreamCertFile != "" || c.NextCertFile != "" {
		bad(server, "SPIRE signs, or the operator's CA, not both: remove ca.upstream_cert_file and ca.next_cert_file")
	}
	if _, err := spiffeid.TrustDomainFromString(td); err != nil {
		bad(server, "trust_domain must be SPIRE's")
	}
}

func hostPort(address string) error {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return err
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 || host == "" {
		return errors.New("no port")
	}
	return nil
}
