package integration

import (
	"bufio"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// programEnv makes this binary be one of the programs below instead of the tests.
const programEnv = "SYMBOLON_TEST_PROGRAM"

// The server's ports, by what it does there.
const (
	portEcho  = 7001 // reads all, then sends it back
	portGreet = 7002 // speaks first, then echoes lines
	portReset = 7003 // reads a line, then resets
	portWatch = 7004 // sends a line, ends its direction, and prints how the client ends
	portSink  = 7005 // reads all, then answers with its SHA-256
	portWho   = 7006 // says whom it sees
	portMany  = 7011 // and the two after it: as portGreet
	portDead  = 7999 // nobody listens
)

func TestMain(m *testing.M) {
	if args := strings.Fields(os.Getenv(programEnv)); len(args) > 0 {
		os.Exit(program(args))
	}
	os.Exit(m.Run())
}

func program(args []string) int {
	if args[0] == "server" {
		return server()
	}
	out, err := clients[args[0]](args[1:])
	if err != nil {
		fmt.Println(outcome(err))
		return 0
	}
	fmt.Println(out)
	return 0
}

// outcome is an error in a word, as applications see it.
func outcome(err error) string {
	var timeout interface{ Timeout() bool }
	switch {
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.ENOTCONN): // shutdown(2) says the latter after a reset
		return "reset"
	case errors.Is(err, syscall.ECONNREFUSED):
		return "refused"
	case errors.Is(err, syscall.EPIPE):
		return "broken pipe"
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return "eof"
	case errors.As(err, &timeout) && timeout.Timeout():
		return "timeout"
	}
	return err.Error()
}

const clientTimeout = 20 * time.Second

func dial(addr string) (*net.TCPConn, error) {
	c, err := net.DialTimeout("tcp", addr, clientTimeout)
	if err != nil {
		return nil, err
	}
	_ = c.SetDeadline(time.Now().Add(clientTimeout))
	return c.(*net.TCPConn), nil
}

// clients are named after what they do; each gets its arguments and says a line.
var clients = map[string]func(args []string) (string, error){
	// echo ADDR TEXT: send, half-close, read the answer to its end.
	"echo": func(a []string) (string, error) { return echo(a[0], a[1]) },
	// greet ADDR: wait for the server to speak first, then answer.
	"greet": func(a []string) (string, error) {
		c, err := dial(a[0])
		if err != nil {
			return "", err
		}
		defer c.Close()
		r := bufio.NewReader(c)
		hello, err := r.ReadString('\n')
		if err != nil {
			return "", err
		}
		if _, err := io.WriteString(c, "thanks\n"); err != nil {
			return "", err
		}
		back, err := r.ReadString('\n')
		return strings.TrimSpace(hello) + "," + strings.TrimSpace(back), err
	},
	// ask ADDR: say our own address and port, and those that the server sees.
	"ask": func(a []string) (string, error) {
		c, err := dial(a[0])
		if err != nil {
			return "", err
		}
		defer c.Close()
		b, err := io.ReadAll(c)
		return fmt.Sprintf("%s %s", c.LocalAddr(), b), err
	},
	// urgent ADDR: as echo, with a byte of urgent data in the middle.
	"urgent": func(a []string) (string, error) {
		c, err := dial(a[0])
		if err != nil {
			return "", err
		}
		defer c.Close()
		if _, err := io.WriteString(c, "AB"); err != nil {
			return "", err
		}
		raw, err := c.SyscallConn()
		if err != nil {
			return "", err
		}
		var sent error
		if err := raw.Write(func(fd uintptr) bool { sent = syscall.Sendto(int(fd), []byte("!"), syscall.MSG_OOB, nil); return true }); err != nil || sent != nil {
			return "", errors.Join(err, sent)
		}
		if _, err := io.WriteString(c, "CD"); err != nil {
			return "", err
		}
		if err := c.CloseWrite(); err != nil {
			return "", err
		}
		b, err := io.ReadAll(c)
		return string(b), err
	},
	// three ADDR: connections to three ports in a row, all open at once; say what each
	// gives back, in the order of opening, twice.
	"three": func(a []string) (string, error) {
		var all []*bufio.ReadWriter
		for i := range 3 {
			c, err := dial(fmt.Sprintf("%s:%d", a[0], portMany+i))
			if err != nil {
				return "", err
			}
			defer c.Close()
			rw := bufio.NewReadWriter(bufio.NewReader(c), bufio.NewWriter(c))
			if _, err := rw.ReadString('\n'); err != nil {
				return "", fmt.Errorf("greeting of connection %d: %w", i, err)
			}
			all = append(all, rw)
		}
		said := ""
		for range 2 {
			for i, rw := range all {
				_, _ = fmt.Fprintf(rw, "%d\n", i)
				_ = rw.Flush()
				line, err := rw.ReadString('\n')
				if err != nil {
					return "", fmt.Errorf("connection %d: %w", i, err)
				}
				said += strings.TrimSpace(line)
			}
		}
		return said, nil
	},
	// chat ADDR: send lines until something is wrong, for a minute at most.
	"chat": func(a []string) (string, error) {
		c, err := dial(a[0])
		if err != nil {
			return "", err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(time.Minute))
		go func() { _, _ = io.Copy(io.Discard, c) }()
		for {
			if _, err := io.WriteString(c, "still there?\n"); err != nil {
				return "", err
			}
			time.Sleep(50 * time.Millisecond)
		}
	},
	// knock ADDR TIME: connect and read within so long.
	"knock": func(a []string) (string, error) {
		limit, err := time.ParseDuration(a[1])
		if err != nil {
			return "", err
		}
		c, err := net.DialTimeout("tcp", a[0], limit)
		if err != nil {
			return "", err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(limit))
		b, err := io.ReadAll(c)
		return string(b), err
	},
	// line ADDR: send a line and read: the server resets.
	"line": func(a []string) (string, error) {
		c, err := dial(a[0])
		if err != nil {
			return "", err
		}
		defer c.Close()
		if _, err := io.WriteString(c, "line\n"); err != nil {
			return "", err
		}
		_, err = c.Read(make([]byte, 1))
		return "no error", err
	},
	// watch ADDR {reset|close}: read the server's end of its direction, then end ours.
	"watch": func(a []string) (string, error) {
		c, err := dial(a[0])
		if err != nil {
			return "", err
		}
		b, err := io.ReadAll(c)
		if err != nil {
			return "", err
		}
		if _, err := io.WriteString(c, "still writing\n"); err != nil {
			return "", err
		}
		time.Sleep(100 * time.Millisecond) // the reset must not overtake the line
		if a[1] == "reset" {
			_ = c.SetLinger(0)
		}
		return strings.TrimSpace(string(b)), c.Close()
	},
	// quits ADDR N: N times an exchange, then a connection that is reset before a word.
	"quits": func(a []string) (string, error) {
		n, _ := strconv.Atoi(a[1])
		for range n {
			if _, err := echo(a[0], "hello"); err != nil {
				return "", err
			}
			c, err := dial(a[0])
			if err != nil {
				return "", err
			}
			_ = c.SetLinger(0)
			_ = c.Close()
		}
		return a[1], nil
	},
	// many ADDR N SIZE: N connections at once, each of which sends SIZE bytes and
	// checks the answer; all are open before the first one sends.
	"many": func(a []string) (string, error) {
		n, _ := strconv.Atoi(a[1])
		size, _ := strconv.Atoi(a[2])
		var ready, done sync.WaitGroup
		begin := make(chan struct{})
		failed := make(chan error, n)
		for i := range n {
			ready.Add(1)
			done.Go(func() {
				c, err := dial(a[0])
				ready.Done()
				if err != nil {
					failed <- err
					return
				}
				defer c.Close()
				_ = c.SetDeadline(time.Now().Add(45 * time.Second))
				<-begin
				data := []byte(strings.Repeat(fmt.Sprintf("%d;", i), size/4))
				if _, err := c.Write(data); err != nil {
					failed <- err
					return
				}
				_ = c.CloseWrite()
				sum, err := io.ReadAll(c)
				if want := fmt.Sprintf("%x", sha256.Sum256(data)); err != nil || string(sum) != want {
					failed <- fmt.Errorf("connection %d: %q, %w", i, sum, err)
				}
			})
		}
		ready.Wait()
		close(begin)
		done.Wait()
		close(failed)
		bad := 0
		var first error
		for err := range failed {
			if bad++; first == nil {
				first = err
			}
		}
		if first != nil {
			return fmt.Sprintf("%d failed, the first: %v", bad, first), nil
		}
		return fmt.Sprintf("%d ok", n), nil
	},
	// connect ADDR SECONDS: connect again and again for so long; say how each ended.
	"connect": func(a []string) (string, error) {
		seconds, _ := strconv.Atoi(a[1])
		counts := map[string]int{}
		for end := time.Now().Add(time.Duration(seconds) * time.Second); time.Now().Before(end); {
			b, err := echo(a[0], "ping")
			switch {
			case err != nil:
				counts[outcome(err)]++
			case b == "ping":
				counts["ok"]++
			default:
				counts["other:"+b]++
			}
		}
		return fmt.Sprint(counts), nil
	},
	// hold ADDR: open, say "open", and then how it ends, within a minute.
	"hold": func(a []string) (string, error) {
		c, err := dial(a[0])
		if err != nil {
			return "", err
		}
		_ = c.SetDeadline(time.Now().Add(time.Minute))
		if _, err := io.WriteString(c, "hello\n"); err != nil {
			return "", err
		}
		r := bufio.NewReader(c)
		for range 2 { // the greeting and the echo
			if _, err := r.ReadString('\n'); err != nil {
				return "", err
			}
		}
		fmt.Println("open")
		_, err = r.ReadByte()
		return "a byte", err
	},
	// until ADDR TEXT: echo, and say how the first one ended; then again until it succeeds.
	"until": func(a []string) (string, error) {
		first := true
		for end := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
			back, err := echo(a[0], a[1])
			if first && err != nil {
				fmt.Println(outcome(err))
			}
			first = false
			if err == nil || time.Now().After(end) {
				return back, err
			}
		}
	},
}

func echo(addr, text string) (string, error) {
	c, err := dial(addr)
	if err != nil {
		return "", err
	}
	return exchange(c, text)
}

// exchange sends text, ends its direction, and reads the answer to its end.
func exchange(c *net.TCPConn, text string) (string, error) {
	defer c.Close()
	if _, err := io.WriteString(c, text); err != nil {
		return "", err
	}
	if err := c.CloseWrite(); err != nil {
		return "", err
	}
	b, err := io.ReadAll(c)
	return string(b), err
}

// server serves on every port of the list above.
func server() int {
	var all sync.WaitGroup
	for port, serve := range map[int]func(*net.TCPConn){
		portEcho:  func(c *net.TCPConn) { b, _ := io.ReadAll(c); _, _ = c.Write(b) },
		portGreet: greet,
		portReset: func(c *net.TCPConn) { _, _ = bufio.NewReader(c).ReadString('\n'); _ = c.SetLinger(0) },
		portWatch: watch,
		portMany:  greet, portMany + 1: greet, portMany + 2: greet,
		portWho: func(c *net.TCPConn) { _, _ = fmt.Fprint(c, c.RemoteAddr()) },
		portSink: func(c *net.TCPConn) {
			h := sha256.New()
			_, _ = io.Copy(h, c)
			_, _ = fmt.Fprintf(c, "%x", h.Sum(nil))
		},
	} {
		l, err := net.Listen("tcp", fmt.Sprintf("[::]:%d", port))
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		all.Go(func() {
			for {
				c, err := l.Accept()
				if err != nil {
					fmt.Fprintln(os.Stderr, err)
					return
				}
				go func() { serve(c.(*net.TCPConn)); _ = c.Close() }()
			}
		})
	}
	all.Wait()
	return 0
}

func greet(c *net.TCPConn) {
	_, _ = io.WriteString(c, "220 welcome\n")
	r := bufio.NewReader(c)
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return
		}
		_, _ = io.WriteString(c, line)
	}
}

func watch(c *net.TCPConn) {
	_, _ = io.WriteString(c, "half\n")
	_ = c.CloseWrite()
	b, err := io.ReadAll(c)
	end := "eof"
	if err != nil {
		end = outcome(err)
	}
	fmt.Printf("watch: %q %s\n", b, end)
}
