package record

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"
)

// openssl is a running s_client or s_server.
type openssl struct {
	in  io.WriteCloser
	mu  sync.Mutex
	out bytes.Buffer
	// grew is signalled when out has grown or the program has ended.
	grew chan struct{}
}

// startOpenSSL runs openssl with the test's certificate. The key goes through a
// pipe: no private key of ours touches a disk.
func startOpenSSL(t *testing.T, arguments ...string) *openssl {
	t.Helper()
	path, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("openssl is not installed")
	}
	certificate, _ := testCertificate()
	key, err := x509.MarshalPKCS8PrivateKey(certificate.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	var extra []*os.File
	for _, block := range []*pem.Block{
		{Type: "CERTIFICATE", Bytes: certificate.Certificate[0]}, {Type: "PRIVATE KEY", Bytes: key},
	} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := pem.Encode(w, block); err != nil { // fits into the pipe
			t.Fatal(err)
		}
		w.Close()
		defer r.Close()
		extra = append(extra, r)
	}
	arguments = append([]string{"-o0", path}, append(arguments, "-cert", "/dev/fd/3", "-key", "/dev/fd/4", "-tls1_3")...)
	command := exec.Command("stdbuf", arguments...) // s_server forgets to flush what it says
	command.ExtraFiles = extra
	stdin, err := command.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	o := &openssl{in: stdin, grew: make(chan struct{}, 1)}
	command.Stdout, command.Stderr = o, o
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		_ = command.Process.Kill()
		_ = command.Wait()
		if t.Failed() {
			t.Logf("openssl said:\n%s", o.out.String())
		}
	})
	return o
}

func (o *openssl) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.out.Write(p)
	select {
	case o.grew <- struct{}{}:
	default:
	}
	return len(p), nil
}

// expect waits for text and consumes everything up to and with it.
func (o *openssl) expect(t *testing.T, text string) {
	t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		o.mu.Lock()
		at := bytes.Index(o.out.Bytes(), []byte(text))
		if at >= 0 {
			o.out.Next(at + len(text))
		}
		o.mu.Unlock()
		if at >= 0 {
			return
		}
		select {
		case <-o.grew:
		case <-deadline:
			t.Fatalf("openssl never said %q", text)
		}
	}
}

// say types a line.
func (o *openssl) say(t *testing.T, line string) {
	t.Helper()
	if _, err := io.WriteString(o.in, line+"\n"); err != nil {
		t.Fatal(err)
	}
}

// converse talks with openssl's user in lines, through key updates of its (K asks
// for ours, k does not) and of ours, and big writes. updated is what it says when it
// has taken the command; what is typed before that, it loses.
func converse(t *testing.T, c *Conn, o *openssl, updated string) {
	t.Helper()
	lines := bufio.NewReader(c.Reader)
	turn := 0
	talk := func() {
		t.Helper()
		turn++
		theirs, ours := fmt.Sprintf("openssl line %d", turn), fmt.Sprintf("symbolon line %d", turn)
		o.say(t, theirs)
		if got, err := lines.ReadString('\n'); err != nil || got != theirs+"\n" {
			t.Fatalf("read %q, %v; want %q", got, err, theirs)
		}
		if _, err := io.WriteString(c.Writer, ours+"\n"); err != nil {
			t.Fatal(err)
		}
		o.expect(t, ours)
	}
	talk()
	read, write := bytes.Clone(c.Reader.state.secret), bytes.Clone(c.Writer.state.secret)
	changed := func(wantRead, wantWrite bool) {
		t.Helper()
		if got := !bytes.Equal(read, c.Reader.state.secret); got != wantRead {
			t.Errorf("read key changed: %v, want %v", got, wantRead)
		}
		if got := !bytes.Equal(write, c.Writer.state.secret); got != wantWrite {
			t.Errorf("write key changed: %v, want %v", got, wantWrite)
		}
		read, write = bytes.Clone(c.Reader.state.secret), bytes.Clone(c.Writer.state.secret)
	}
	o.say(t, "k")
	o.expect(t, updated)
	talk()
	changed(true, false)
	o.say(t, "K")
	o.expect(t, updated)
	talk()
	changed(true, true)
	if err := c.SendKeyUpdate(false); err != nil {
		t.Fatal(err)
	}
	talk()
	changed(false, true)
	if err := c.SendKeyUpdate(true); err != nil {
		t.Fatal(err)
	}
	talk()
	talk() // by now it has answered
	changed(true, true)
	o.say(t, "K") // both at once
	if err := c.SendKeyUpdate(true); err != nil {
		t.Fatal(err)
	}
	o.expect(t, updated)
	talk()
	talk()
	changed(true, true)
	if _, err := c.Write(append(bytes.Repeat([]byte("x"), 200_000), "end of the big write\n"...)); err != nil {
		t.Fatal(err)
	}
	o.expect(t, "end of the big write")
	talk()
}

func TestOpenSSLServer(t *testing.T) {
	for _, suite := range []string{"TLS_AES_256_GCM_SHA384", "TLS_AES_128_GCM_SHA256"} {
		t.Run(suite, func(t *testing.T) {
			if suite == "TLS_AES_128_GCM_SHA256" {
				useSuite(tls.TLS_AES_128_GCM_SHA256)
				defer useSuite(tls.TLS_AES_256_GCM_SHA384)
			}
			port := freePort(t)
			o := startOpenSSL(t, "s_server", "-accept", "127.0.0.1:"+port, "-ciphersuites", suite, "-Verify", "1", "-verify_quiet")
			o.expect(t, "ACCEPT")
			tcp, err := net.Dial("tcp", "127.0.0.1:"+port)
			if err != nil {
				t.Fatal(err)
			}
			defer tcp.Close()
			if err := tcp.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
				t.Fatal(err)
			}
			p := newParties()
			e := &end{tap: NewTap(tcp, p.clientLog)}
			defer e.tap.Release()
			e.tls = tls.Client(e.tap, p.client)
			c := e.establish(t)
			converse(t, c, o, "SSL_do_handshake -> 1")
			if err := c.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			o.expect(t, "DONE") // what s_server says to close_notify
		})
	}
}

func TestOpenSSLClient(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	o := startOpenSSL(t, "s_client", "-connect", l.Addr().String(), "-ciphersuites", "TLS_AES_256_GCM_SHA384", "-servername", "test")
	tcp, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	if err := tcp.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	p := newParties()
	e := &end{tap: NewTap(tcp, p.serverLog)}
	defer e.tap.Release()
	e.tls = tls.Server(e.tap, p.server)
	c := e.establish(t)
	converse(t, c, o, "KEYUPDATE")
	o.say(t, "Q") // quits with close_notify
	for err = nil; err == nil; {
		_, err = c.Next()
	}
	if !errors.Is(err, io.EOF) || errors.Is(err, ErrTruncated) {
		t.Errorf("end: %v, want io.EOF", err)
	}
}

func (e *end) establish(t *testing.T) *Conn {
	t.Helper()
	if err := e.tls.Handshake(); err != nil {
		t.Fatal(err)
	}
	if err := e.tap.Established(e.tls.ConnectionState()); err != nil {
		t.Fatal(err)
	}
	return e.take(t)
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := strings.Cut(l.Addr().String(), ":")
	return port
}
