package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"sync"

	_ "github.com/symbolon/symbolon/mtls" // leaves AES-256-GCM only in crypto/tls
)

// relayMain is half of the pair that shows what Go gives without further effort:
// io.Copy over crypto/tls, which is what ghostunnel does.
func relayMain(ctx context.Context, args []string) error {
	f := flag.NewFlagSet("relay", flag.ContinueOnError)
	listen := f.String("listen", "", "address and port")
	target := f.String("target", "", "address and port")
	client := f.Bool("client", false, "TLS is on the target's side")
	ca, cert, key := f.String("ca", "", "file"), f.String("cert", "", "file"), f.String("key", "", "file")
	if err := f.Parse(args); err != nil {
		return err
	}
	config, err := relayConfig(*ca, *cert, *key)
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", *listen)
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { l.Close() })()
	for {
		c, err := l.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		go relay(c, *target, config, *client)
	}
}

func relayConfig(ca, cert, key string) (*tls.Config, error) {
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		return nil, err
	}
	text, err := os.ReadFile(ca)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		return nil, fmt.Errorf("no certificate in %s", ca)
	}
	return &tls.Config{
		Certificates: []tls.Certificate{pair}, RootCAs: pool, ClientCAs: pool, ServerName: serverName,
		ClientAuth: tls.RequireAndVerifyClientCert, MinVersion: tls.VersionTLS13,
		CurvePreferences:   []tls.CurveID{tls.X25519},
		ClientSessionCache: tls.NewLRUClientSessionCache(0),
	}, nil
}

// halfCloser is what TCP and TLS connections have in common.
type halfCloser interface {
	net.Conn
	CloseWrite() error
}

func relay(accepted net.Conn, target string, config *tls.Config, client bool) {
	defer accepted.Close()
	var near, far halfCloser
	near = accepted.(*net.TCPConn)
	if !client {
		t := tls.Server(accepted, config)
		if t.Handshake() != nil {
			return // nothing reaches the application before
		}
		near = t
	}
	out, err := net.Dial("tcp", target)
	if err != nil {
		return
	}
	defer out.Close()
	far = out.(*net.TCPConn)
	if client {
		t := tls.Client(out, config)
		if t.Handshake() != nil {
			return
		}
		far = t
	}
	var wg sync.WaitGroup
	for _, way := range [][2]halfCloser{{near, far}, {far, near}} {
		wg.Go(func() {
			if _, err := io.Copy(way[1], way[0]); err != nil && !errors.Is(err, io.EOF) {
				near.Close()
				far.Close()
				return
			}
			_ = way[1].CloseWrite() // the other end may be gone, as is its right
		})
	}
	wg.Wait()
}
