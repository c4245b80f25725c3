package redirect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// connClient as numbers: what conntrack has, and which bits of it are ours.
const (
	connClientValue = 0x4d020000
	connMask        = 0xffff0000
)

// endClientLegs resets what applications still hold open towards a client's address
// that the proxy bore. The proxy's end is gone, or goes; what an application still
// sends must find no way to the client when the rules are not there any more.
func endClientLegs() error {
	diag, err := NewDiag()
	if err != nil {
		return fmt.Errorf("end applications' connections: %w", err)
	}
	defer diag.Close()
	h, err := netlink.NewHandle(unix.NETLINK_NETFILTER)
	if err != nil {
		return fmt.Errorf("end applications' connections: %w", err)
	}
	defer h.Close()
	var errs []error
	for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
		flows, err := h.ConntrackTableList(netlink.ConntrackTable, family)
		if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) {
			continue // this kernel tracks no connections of the family
		}
		if err != nil {
			return fmt.Errorf("end applications' connections: list them: %w", err)
		}
		for _, flow := range flows {
			if flow.Mark&connMask != connClientValue || flow.Forward.Protocol != unix.IPPROTO_TCP {
				continue
			}
			one, _ := netip.AddrFromSlice(flow.Forward.SrcIP)
			other, _ := netip.AddrFromSlice(flow.Forward.DstIP)
			src, dst := netip.AddrPortFrom(one, flow.Forward.SrcPort), netip.AddrPortFrom(other, flow.Forward.DstPort)
			// Whichever end began, as conntrack saw it.
			errs = append(errs, diag.end(src, dst), diag.end(dst, src))
		}
	}
	return errors.Join(errs...)
}

const sockDestroy = 21 // SOCK_DESTROY, linux/sock_diag.h

// end resets the connected socket of this host whose own address is src and whose
// peer is dst, if there is one. It needs CAP_NET_ADMIN, and a kernel with
// CONFIG_INET_DIAG_DESTROY.
func (d *Diag) end(src, dst netip.AddrPort) error {
	owner, err := d.Owner(src, dst)
	if errors.Is(err, ErrNoSocket) {
		return nil
	}
	if err != nil {
		return err
	}
	request := diagRequest(unix.AF_INET, plain(src), plain(dst))
	if !plain(src).Addr().Is4() {
		request = diagRequest(unix.AF_INET6, src, dst)
	}
	binary.NativeEndian.PutUint16(request[4:], sockDestroy)
	binary.NativeEndian.PutUint16(request[6:], unix.NLM_F_REQUEST|unix.NLM_F_ACK)
	// The very socket that was found: by its addresses alone the kernel would also end
	// a listener.
	cookie := request[nlHeaderLen+48:]
	binary.NativeEndian.PutUint32(cookie, uint32(owner.Cookie))
	binary.NativeEndian.PutUint32(cookie[4:], uint32(owner.Cookie>>32))
	err = d.nl.query(request[:], unix.NLMSG_ERROR, func(payload []byte) error {
		if len(payload) < 4 {
			return errShortMessage
		}
		if code := int32(binary.NativeEndian.Uint32(payload)); code != 0 {
			return unix.Errno(-code)
		}
		return nil
	})
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("end the connection of %s with %s: %w", src, dst, err)
	}
	return nil
}
