package mtls

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

func framed(p *Peer) (*symbolonv1.Open, error) {
	o, err := asking(encrypted)(p)
	o.Framed = true
	return o, err
}

// framedTunnel is a reusable one, in its first use.
func framedTunnel(t *testing.T) (client, server *Conn) {
	t.Helper()
	web, db := endpoints(t)
	return keptTunnel(t, web, db, framed)
}

func TestReuse(t *testing.T) {
	client, server := framedTunnel(t)
	ctx := timeout(t)
	for i := range 5 {
		if client.Reusable() || server.Reusable() {
			t.Fatal("reusable while in use")
		}
		talk(t, client, server)
		if !client.Reusable() || !server.Reusable() {
			t.Fatalf("use %d ended cleanly, and the tunnel is not reusable", i)
		}
		if !client.Idle() {
			t.Fatal("the tunnel is not idle")
		}
		next := make(chan error, 1)
		go func() {
			open, err := server.NextOpen(ctx)
			if err == nil && open.GetDestinationPort() != 1234 {
				err = fmt.Errorf("open: %v", open)
			}
			if err == nil {
				err = server.Grant(ctx, &symbolonv1.Verdict{Protection: encrypted, Keep: true})
			}
			next <- err
		}()
		open, _ := framed(nil)
		open.DestinationPort = 1234
		if err := client.Reopen(ctx, open); err != nil {
			t.Fatal(err)
		}
		if _, err := client.ReadVerdict(ctx); err != nil {
			t.Fatal(err)
		}
		if err := <-next; err != nil {
			t.Fatal(err)
		}
	}
}

func TestUnfinishedTunnelIsNotReusable(t *testing.T) {
	client, server := framedTunnel(t)
	io.WriteString(client, "x")
	client.CloseWrite()
	if client.Reusable() {
		t.Error("reusable with one direction open")
	}
	if b, err := io.ReadAll(server); string(b) != "x" || err != nil {
		t.Fatalf("%q, %v", b, err)
	}
	if server.Reusable() {
		t.Error("the server's end is reusable with one direction open")
	}
	if _, err := client.Write([]byte("y")); err == nil {
		t.Error("written after the end")
	}
}

// The end of TLS is the end of a framed direction only if a frame said so: not even
// close_notify may pass for it.
func TestFramedTruncation(t *testing.T) {
	for name, end := range map[string]func(*Conn){
		"FIN":          func(c *Conn) { c.wire.Socket.CloseWrite() },
		"close_notify": func(c *Conn) { c.out.CloseWrite(); c.wire.Socket.CloseWrite() },
		"inside a frame": func(c *Conn) {
			c.out.Write(append(binary.BigEndian.AppendUint32(nil, 100), "short"...))
			c.out.CloseWrite()
		},
	} {
		t.Run(name, func(t *testing.T) {
			client, server := framedTunnel(t)
			end(client)
			if _, err := io.ReadAll(server); !errors.Is(err, ErrTruncated) {
				t.Errorf("read %v, want ErrTruncated", err)
			}
		})
	}
}

func TestFrameTooLarge(t *testing.T) {
	client, server := framedTunnel(t)
	client.out.Write([]byte{0, 0x10, 0, 1, 'x'})
	if _, err := server.Read(make([]byte, 10)); !errors.Is(err, ErrProtocol) {
		t.Errorf("got %v, want ErrProtocol", err)
	}
}

func TestNextOpenEnds(t *testing.T) {
	finish := func(t *testing.T) (*Conn, *Conn) {
		client, server := framedTunnel(t)
		talk(t, client, server)
		return client, server
	}
	t.Run("the client goes", func(t *testing.T) {
		client, server := finish(t)
		client.Close()
		if _, err := server.NextOpen(timeout(t)); !errors.Is(err, io.EOF) {
			t.Errorf("got %v, want io.EOF", err)
		}
	})
	t.Run("nobody comes", func(t *testing.T) {
		client, server := finish(t)
		ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
		defer cancel()
		if _, err := server.NextOpen(ctx); !errors.Is(err, io.EOF) {
			t.Errorf("got %v, want io.EOF", err)
		}
		for range 500 { // the end arrives
			if !client.Idle() {
				return
			}
			time.Sleep(time.Millisecond)
		}
		t.Error("the client's end does not see that the server stopped waiting")
	})
	// The data phase is framed and encrypted already, and stays so.
	for name, protection := range map[string]symbolonv1.Protection{"unframed": encrypted, "weaker": authenticated} {
		t.Run(name, func(t *testing.T) {
			client, server := finish(t)
			open, _ := asking(protection)(nil)
			if err := client.Reopen(timeout(t), open); err != nil {
				t.Fatal(err)
			}
			if _, err := server.NextOpen(timeout(t)); ReasonOf(err) != symbolonv1.Reason_REASON_OPEN_MALFORMED {
				t.Errorf("got %v", err)
			}
			if _, err := client.ReadVerdict(timeout(t)); ReasonOf(err) != symbolonv1.Reason_REASON_PEER_REFUSED {
				t.Errorf("the client is told %v", err)
			}
		})
	}
	t.Run("nonsense comes", func(t *testing.T) {
		client, server := finish(t)
		client.out.Write([]byte("\x00\x00\x00\x03junk"))
		if _, err := server.NextOpen(timeout(t)); ReasonOf(err) != symbolonv1.Reason_REASON_OPEN_MALFORMED {
			t.Errorf("got %v", err)
		}
	})
}

func TestFramesNeedEncryption(t *testing.T) {
	o, _ := asking(authenticated)(nil)
	o.Framed = true
	if err := checkOpen(o); !errors.Is(err, ErrOpenMalformed) || !strings.Contains(err.Error(), "frames") {
		t.Errorf("got %v", err)
	}
}

// A server that did not allow it has closed when its application did.
func TestKeepNeedsBothSides(t *testing.T) {
	web, db := endpoints(t)
	ctx := timeout(t)
	c, s := pair(t)
	ch := accept(ctx, s, db, &symbolonv1.Verdict{Accept: true, Protection: encrypted})
	client, err := Dial(ctx, c, web, framed)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.ReadVerdict(ctx); err != nil {
		t.Fatal(err)
	}
	server := (<-ch).conn
	talk(t, client, server)
	if client.Reusable() || server.Reusable() {
		t.Error("reusable without the server's consent")
	}
}
