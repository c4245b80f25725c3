package controller

import (
	"net"
	"testing"
	"time"
)

// One address gets no more than its share of the bundle endpoint, and loses nobody else's
// place; what it lets go of it can have again.
func TestOneAddressCannotTakeTheBundleEndpoint(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := newBoundedListener(inner, 8, 3)
	defer l.Close()
	accepted := make(chan net.Conn, 16)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				close(accepted)
				return
			}
			accepted <- c
		}
	}()
	dial := func(from string) net.Conn {
		t.Helper()
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: 20 * time.Second}
		c, err := d.Dial("tcp", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	next := func() net.Conn {
		t.Helper()
		select {
		case c := <-accepted:
			return c
		case <-time.After(20 * time.Second):
			t.Fatal("nobody is accepted")
			return nil
		}
	}
	var greedy []net.Conn
	for range 3 {
		dial("127.0.0.2")
		greedy = append(greedy, next())
	}
	// Beyond its share it is closed, however often it comes.
	for range 10 {
		c := dial("127.0.0.2")
		_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
		if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil {
			t.Fatalf("read %d bytes, %v", n, err)
		} else if ne, ok := err.(net.Error); ok && ne.Timeout() { //nolint:errorlint // as net returns it
			t.Fatal("it was not closed")
		}
	}
	other := dial("127.0.0.3")
	if got := next().RemoteAddr().String(); got != other.LocalAddr().String() {
		t.Errorf("accepted %s, want %s", got, other.LocalAddr())
	}
	_ = greedy[0].Close()
	again := dial("127.0.0.2")
	if got := next().RemoteAddr().String(); got != again.LocalAddr().String() {
		t.Errorf("accepted %s, want %s", got, again.LocalAddr())
	}
}

func TestWhoCountsAsOneAddress(t *testing.T) {
	for in, want := range map[string]string{
		"192.0.2.7:443": "192.0.2.7/32", "[::ffff:192.0.2.7]:443": "192.0.2.7/32",
		"[2001:db8:1:2:3::9]:1": "2001:db8:1:2::/64", "[fe80::1%eth0]:1": "fe80::/64",
	} {
		a, err := net.ResolveTCPAddr("tcp", in)
		if err != nil {
			t.Fatal(err)
		}
		if got := addressGroup(a).String(); got != want {
			t.Errorf("%s: %s, want %s", in, got, want)
		}
	}
}
