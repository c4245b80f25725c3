package proxy

import (
	"context"
	"errors"
	"time"

	"golang.org/x/sys/unix"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
)

// confirmEvery is how often confirmed looks: the kernel has no event for it.
const confirmEvery = 2 * time.Millisecond

// confirmed waits until a client without a proxy has answered our SYN-ACK. A SYN that
// brought data may be an old one which the network delivers again, and whose bytes the
// application has had; such a one is never answered but by a reset. A tunnel needs no
// such wait, as its handshake is one. Without tunnel.fast_open it is asked all the same: a
// process that is to take over has the same listener, and may have it set.
func (x *conn) confirmed(ctx context.Context) error {
	for {
		var info *unix.TCPInfo
		var err error
		if cerr := x.accepted.control(func(fd int) { info, err = unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO) }); cerr != nil || err != nil {
			return networkError(errors.Join(cerr, err))
		}
		switch info.State {
		case unix.BPF_TCP_SYN_RECV:
		case unix.BPF_TCP_CLOSE:
			return deny(symbolonv1.Reason_REASON_RESET, errors.New("the client does not know of the connection that its first packet began"))
		default:
			return nil
		}
		select {
		case <-ctx.Done():
			return networkError(ctx.Err())
		case <-time.After(confirmEvery):
		}
	}
}
