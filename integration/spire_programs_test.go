package integration

import (
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"syscall"
)

// Programs that become others, beside those of program_test.go.
func init() {
	// become ADDR FILE: exchange, execute FILE, which does the same, and say both.
	clients["become"] = func(a []string) (string, error) {
		said, err := echo(a[0], "before")
		if err != nil {
			said = outcome(err)
		}
		fmt.Println(said)
		return "", execute(a[1], "echo "+a[0]+" after")
	}
	// switch ADDR FILE: connect, send, and at once execute FILE, which reads the answer.
	clients["switch"] = func(a []string) (string, error) {
		c, err := dial(a[0])
		if err != nil {
			return "", err
		}
		if _, err := io.WriteString(c, "stolen"); err != nil {
			return "", err
		}
		if err := c.CloseWrite(); err != nil {
			return "", err
		}
		f, err := c.File() // a duplicate
		if err != nil {
			return "", err
		}
		fd, err := syscall.Dup(int(f.Fd())) // without close-on-exec
		if err != nil {
			return "", err
		}
		return "", execute(a[1], fmt.Sprintf("inherit %d", fd))
	}
	// inherit FD: read a connection that somebody else has opened, to its end.
	clients["inherit"] = func(a []string) (string, error) {
		fd, err := strconv.Atoi(a[0])
		if err != nil {
			return "", err
		}
		c, err := net.FileConn(os.NewFile(uintptr(fd), "inherited"))
		if err != nil {
			return "", err
		}
		defer c.Close()
		b, err := io.ReadAll(c)
		return string(b), err
	}
}

// execute makes this process be the program in file. It returns only if it cannot.
func execute(file, program string) error {
	if err := os.Setenv(programEnv, program); err != nil {
		return err
	}
	return syscall.Exec(file, []string{file}, os.Environ())
}
