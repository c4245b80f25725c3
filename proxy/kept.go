package proxy

import (
	"context"
	"fmt"
	"time"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/mtls"
	"github.com/symbolon/symbolon/proxy/loop"
)

// kept is a tunnel between two connections, and at the beginning of the next one: what
// has the socket is asked to do what mtls.Conn does by itself otherwise.
type kept struct {
	*mtls.Conn
	// on is its socket, which an event loop has; nil: the runtime has it, since
	// crypto/tls has the data phase.
	on *loop.Tunnel
}

// Idle is mtls.Conn's, and so are the others.
func (k kept) Idle() bool {
	if k.on != nil {
		return k.on.Idle()
	}
	return k.Conn.Idle()
}

func (k kept) Close() error {
	if k.on == nil {
		return k.Conn.Close()
	}
	k.on.Close()
	return nil
}

func (k kept) Reset() error {
	if k.on == nil {
		return k.Conn.Reset()
	}
	k.on.Reset()
	return nil
}

// Reopen sends the Open of another connection, and early bytes of said: what the
// application has said already saves a round trip that way, and the peer's proxy holds it
// back until it has decided. On error nothing has reached an application, and the tunnel is
// closed.
func (k kept) Reopen(ctx context.Context, open *symbolonv1.Open, said []byte) (early int, err error) {
	if k.on != nil {
		err = k.on.Send(func(buf []byte) (sealed []byte, err error) {
			sealed, early, err = k.SealOpen(buf, open, said)
			return sealed, err
		})
	} else {
		err = k.Conn.Reopen(ctx, open)
	}
	if err != nil {
		_ = k.Close()
	}
	return early, err
}

// ReadVerdict waits for the server's half. On error the tunnel is closed.
func (k kept) ReadVerdict(ctx context.Context) (v *symbolonv1.Verdict, err error) {
	if k.on == nil {
		return k.Conn.ReadVerdict(ctx)
	}
	type message struct {
		bytes []byte
		err   error
	}
	said := make(chan message, 1)
	k.on.Await(func(m []byte, err error) { said <- message{m, err} })
	select {
	case m := <-said:
		v, err = k.TakeVerdict(m.bytes, m.err)
	case <-ctx.Done():
		v, err = k.TakeVerdict(nil, ctx.Err())
	}
	if err != nil {
		k.on.Close()
	}
	return v, err
}

// Grant sends an accepting verdict. On error the tunnel is reset.
func (k kept) Grant(ctx context.Context, v *symbolonv1.Verdict) error {
	if k.on == nil {
		return k.Conn.Grant(ctx, v)
	}
	err := k.on.Send(func(buf []byte) ([]byte, error) { return k.SealVerdict(buf, v) })
	if err != nil {
		k.on.Reset()
		return deny(mtls.NetworkReason(err), fmt.Errorf("sending verdict: %w", err))
	}
	return nil
}

// Refuse sends a denying verdict, and closes.
func (k kept) Refuse(v *symbolonv1.Verdict) {
	if k.attach() == nil {
		k.Conn.Refuse(v)
	}
}

// leave ends a tunnel on which the client may be asking just now: it hears of the end, and
// not of a reset, and asks on another one. after is called when all is closed.
func (k kept) leave(after func()) {
	if k.on != nil {
		k.on.Leave(lingers, after)
		return
	}
	_ = k.Conn.Close()
	after()
}

// lingers is how long an Open may be under way when a tunnel ends.
const lingers = time.Second

// attach gives the tunnel its socket back, for what is not done on a loop. On error the
// tunnel is closed.
func (k kept) attach() error {
	if k.on == nil {
		return nil
	}
	s, err := k.on.Detach()
	if err != nil {
		return err
	}
	return k.Conn.Attach(s.FD, s.Stream, s.Sealed)
}
