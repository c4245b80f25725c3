package containerlab

import (
	"os"
	"os/exec"
	"syscall"
	"testing"
)

// service is the process behind a runtime's socket.
type service struct{ running *exec.Cmd }

// start starts c, which ends with this process.
func (s *service) start(t testing.TB, c *exec.Cmd) {
	t.Helper()
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	s.running = c
}

// stop ends it, if it runs, and removes its socket.
func (s *service) stop(socket string) {
	if s.running != nil {
		_ = s.running.Process.Kill()
		_ = s.running.Wait()
		s.running = nil
	}
	os.Remove(socket)
}
