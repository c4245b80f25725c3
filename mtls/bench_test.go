package mtls

import (
	"errors"
	"net"
	"testing"

	"golang.org/x/sys/unix"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// BenchmarkTunnel is a tunnel from both ends, with the TCP connection below it:
// handshake, Open and Verdict. CPU is of both, user and system time.
func BenchmarkTunnel(b *testing.B) {
	for _, of := range []struct {
		name       string
		options    Options
		protection symbolonv1.Protection
	}{
		{"resumed", Options{}, symbolonv1.Protection_PROTECTION_ENCRYPTED},
		{"resumed/authenticated", Options{}, symbolonv1.Protection_PROTECTION_AUTHENTICATED},
		{"full", Options{NoResumption: true}, symbolonv1.Protection_PROTECTION_ENCRYPTED},
	} {
		b.Run(of.name, func(b *testing.B) {
			a := newAuthority(b, "a.example")
			client := NewEndpoint(a.workload("/prod/web", nil), of.options)
			server := NewEndpoint(a.workload("/prod/db", nil), of.options)
			l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
			if err != nil {
				b.Fatal(err)
			}
			defer l.Close()
			serve := make(chan *net.TCPConn)
			served := make(chan error)
			defer close(serve)
			ctx := timeout(b)
			go func() {
				for tcp := range serve {
					s, _, err := Accept(ctx, tcp, server)
					if err == nil {
						err = s.Grant(ctx, &symbolonv1.Verdict{Protection: of.protection})
						_ = s.Reset()
					}
					served <- err
				}
			}()
			one := func() (resumed bool) {
				// Sessions are kept by destination, so all connections go to one listener.
				tcp, err := net.DialTCP("tcp", nil, l.Addr().(*net.TCPAddr))
				if err != nil {
					b.Fatal(err)
				}
				accepted, err := l.AcceptTCP()
				if err != nil {
					b.Fatal(err)
				}
				serve <- accepted
				c, err := Dial(ctx, tcp, client, asking(of.protection))
				if err == nil {
					_, err = c.ReadVerdict(ctx)
				}
				if err := errors.Join(err, <-served); err != nil {
					b.Fatal(err)
				}
				_ = c.Reset()
				return c.Info().Resumed
			}
			one() // brings the ticket
			if resumed := one(); resumed == of.options.NoResumption {
				b.Fatalf("resumed: %v", resumed)
			}
			b.ReportAllocs()
			began, n := cpu(b), 0
			for b.Loop() {
				one()
				n++
			}
			b.ReportMetric(float64(cpu(b)-began)/float64(n)/1e3, "CPU-µs/op")
		})
	}
}

// cpu is this process's CPU time so far, ns.
func cpu(b *testing.B) int64 {
	b.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return u.Utime.Nano() + u.Stime.Nano()
}
