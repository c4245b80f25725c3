package names

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	// maxServers is glibc's MAXNS.
	maxServers = 3
	maxConf    = 64 << 10
	dnsPort    = "53"
)

// settings are what resolv.conf(5) says, as far as it counts here.
type settings struct {
	servers  []string // address:port
	timeout  time.Duration
	attempts int
}

// conf reads a resolv.conf again when it has changed. Safe for concurrent use.
type conf struct {
	path string

	mu       sync.Mutex
	read     fs.FileInfo
	settings settings
}

func (c *conf) now() settings {
	c.mu.Lock()
	defer c.mu.Unlock()
	info, err := os.Stat(c.path)
	if err == nil && c.read != nil && os.SameFile(info, c.read) && info.ModTime().Equal(c.read.ModTime()) && info.Size() == c.read.Size() {
		return c.settings
	}
	var text []byte
	if f, err := os.Open(c.path); err == nil {
		text, _ = io.ReadAll(io.LimitReader(f, maxConf)) // half a file is read again when it is whole
		_ = f.Close()
	} else if !errors.Is(err, fs.ErrNotExist) && c.read != nil {
		return c.settings
	}
	c.read, c.settings = info, parseConf(text)
	return c.settings
}

// parseConf takes what it understands. Without a server it is the one on this host.
func parseConf(text []byte) settings {
	s := settings{timeout: 2 * time.Second, attempts: 2}
	lines := bufio.NewScanner(bytes.NewReader(text))
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 2 {
			continue
		}
		switch fields[0] {
		case "nameserver":
			if a, err := netip.ParseAddr(fields[1]); err == nil && len(s.servers) < maxServers {
				s.servers = append(s.servers, net.JoinHostPort(a.String(), dnsPort))
			}
		case "options":
			for _, o := range fields[1:] {
				if n, ok := option(o, "timeout:"); ok {
					s.timeout = time.Duration(min(max(n, 1), 10)) * time.Second
				}
				if n, ok := option(o, "attempts:"); ok {
					s.attempts = min(max(n, 1), 5)
				}
			}
		}
	}
	if len(s.servers) == 0 {
		s.servers = []string{net.JoinHostPort("127.0.0.1", dnsPort)}
	}
	return s
}

func option(o, name string) (int, bool) {
	text, ok := strings.CutPrefix(o, name)
	if !ok {
		return 0, false
	}
	n, err := strconv.Atoi(text)
	return n, err == nil
}
