package serve

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/symbolon/symbolon/identity"
)

const (
	// attestTimeout bounds finding out who calls, firstAnswer waiting for an SVID.
	attestTimeout = 10 * time.Second
	firstAnswer   = 30 * time.Second
	// proofTimeout is how long a client may take to acknowledge our settings.
	proofTimeout = 5 * time.Second
	// checkEvery is how soon a process that has become another loses its stream.
	checkEvery = time.Second
	// maxConnections bounds those of all programs, maxPerUser those of one user, and
	// maxStreams the calls on one.
	maxConnections, maxPerUser, maxStreams = 1024, 128, 16
	// maxMeeting is how many callers are looked at at a time, maxMeetingPerUser how many of
	// one user. maxWatching bounds the descriptors that watching unproven callers takes, one
	// for each of their threads, maxWatchingPerUser those for one user.
	maxMeeting, maxMeetingPerUser   = 16, 4
	maxWatching, maxWatchingPerUser = 32 << 10, 8 << 10
	// maxRequest is far above any request, bytes.
	maxRequest = 64 << 10
	// header is what every call must carry (SPIFFE Workload Endpoint, section 5).
	header = "workload.spiffe.io"
)

// Resolver finds the workload of a process; identity.NewProcessResolver's does.
type Resolver interface {
	Process(ctx context.Context, pid int) (*identity.Workload, error)
}

// Server is the Workload API on a Unix socket. Close it.
type Server struct {
	workload.UnimplementedSpiffeWorkloadAPIServer

	source identity.Source
	log    *zap.Logger
	grpc   *grpc.Server
	served sync.WaitGroup

	mu    sync.Mutex
	all   int
	users map[uint32]int
	// watched are descriptors.
	allWatched int
	watched    map[uint32]int
}

// Listen serves on the socket path until Close. Every local user may connect: what is
// given depends on the process. What an earlier run has left at the path is replaced.
func Listen(path string, source identity.Source, resolver Resolver, log *zap.Logger) (*Server, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("workload API: %w", err)
	}
	if st, err := os.Lstat(path); err == nil && st.Mode().Type() != os.ModeSocket {
		return nil, fmt.Errorf("workload API: %s is there, and no socket: choose another path", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("workload API: %w", err)
	}
	l, err := listen(path)
	if err != nil {
		return nil, fmt.Errorf("workload API: %w", err)
	}
	if err := os.Chmod(path, 0o666); err != nil {
		_ = l.Close()
		return nil, fmt.Errorf("workload API: %w", err)
	}
	s := &Server{source: source, log: log, users: make(map[uint32]int), watched: make(map[uint32]int)}
	s.grpc = grpc.NewServer(
		grpc.Creds(peers{find: resolver.Process, enter: s.enter, slots: identity.NewShares(maxMeeting, maxMeetingPerUser), watching: s.watching, log: log}),
		grpc.MaxRecvMsgSize(maxRequest), grpc.MaxConcurrentStreams(maxStreams),
		grpc.ConnectionTimeout(attestTimeout), grpc.MaxHeaderListSize(16<<10),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: 10 * time.Minute}),
		grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			if err := checkHeader(ctx); err != nil {
				return nil, err
			}
			return next(ctx, req)
		}),
		grpc.StreamInterceptor(func(srv any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
			if err := checkHeader(stream.Context()); err != nil {
				return err
			}
			return next(srv, stream)
		}),
	)
	workload.RegisterSpiffeWorkloadAPIServer(s.grpc, s)
	s.served.Go(func() {
		if err := s.grpc.Serve(l); err != nil {
			log.Error("the Workload API is not served any more", zap.Error(err))
		}
	})
	return s, nil
}

// listen makes connections whose every byte comes with its writer: from the first one on,
// as accepted sockets inherit that.
func listen(path string) (*net.UnixListener, error) {
	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		return control(raw, func(fd int) error {
			return os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PASSCRED, 1))
		})
	}}
	l, err := config.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, err
	}
	u := l.(*net.UnixListener)
	u.SetUnlinkOnClose(false) // the name may be the next process's by then
	return u, nil
}

// Close ends all streams and waits for them.
func (s *Server) Close() {
	s.grpc.Stop()
	s.served.Wait()
}

// checkHeader keeps out what a browser or a proxy could be talked into.
func checkHeader(ctx context.Context) error {
	md, _ := metadata.FromIncomingContext(ctx)
	if v := md.Get(header); len(v) != 1 || v[0] != "true" {
		return status.Errorf(codes.InvalidArgument, "security header missing: send the metadata %s: true", header)
	}
	return nil
}

// enter counts a user's connection.
func (s *Server) enter(uid uint32) (leave func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.all >= maxConnections || s.users[uid] >= maxPerUser {
		return nil, fmt.Errorf("user %d has %d connections, all users %d: too many: %w", uid, s.users[uid], s.all, syscall.EUSERS)
	}
	s.all++
	s.users[uid]++
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.all--
		if s.users[uid]--; s.users[uid] == 0 {
			delete(s.users, uid)
		}
	}, nil
}

// watching counts n descriptors for watching a user's process.
func (s *Server) watching(uid uint32, n int) (release func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.allWatched+n > maxWatching || s.watched[uid]+n > maxWatchingPerUser {
		return nil, fmt.Errorf("processes of user %d with %d threads, of all users with %d, have connected and not yet spoken: %w", uid, s.watched[uid]+n, s.allWatched+n, syscall.EUSERS)
	}
	s.allWatched += n
	s.watched[uid] += n
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.allWatched -= n
		if s.watched[uid] -= n; s.watched[uid] == 0 {
			delete(s.watched, uid)
		}
	}, nil
}

// callerOf is who calls, once that is proven.
func callerOf(ctx context.Context) (*caller, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, status.Error(codes.Internal, "no peer")
	}
	x, ok := p.AuthInfo.(*caller)
	if !ok {
		return nil, status.Error(codes.Internal, "no caller")
	}
	timer := time.NewTimer(proofTimeout)
	defer timer.Stop()
	select {
	case <-x.proven:
		return x, nil
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	case <-timer.C:
		return nil, status.Error(codes.PermissionDenied, "no identity issued: the process that connected has not answered")
	}
}
