package netlab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
)

// dataDir makes a directory for a service that only its user can read, as
// PostgreSQL insists. fresh is false if an earlier run of the unit made it.
func (h *Host) dataDir(unit, user string) (dir string, fresh bool, err error) {
	parent, err := h.world.mkdir(h.name, unit)
	if err != nil {
		return "", false, err
	}
	cred, err := credential(user)
	if err != nil {
		return "", false, err
	}
	dir = filepath.Join(parent, "data")
	if err := os.Mkdir(dir, 0o700); errors.Is(err, fs.ErrExist) {
		return dir, false, nil
	} else if err != nil {
		return "", false, err
	}
	return dir, true, os.Chown(dir, int(cred.Uid), int(cred.Gid))
}

// Postgres starts PostgreSQL on IPv4 and IPv6, as the user postgres of the
// machine, with a cluster of its own. It trusts every client, as any role; there
// is the superuser "postgres" and a database of that name. The unit is
// postgresql.service; starting it again after Stop or Kill keeps its data.
func (h *Host) Postgres(ctx context.Context, port uint16) (*Daemon, error) {
	const unit, user = "postgresql.service", "postgres"
	dir, fresh, err := h.dataDir(unit, user)
	if err != nil {
		return nil, fmt.Errorf("netlab: postgres on %s: %w", h.name, err)
	}
	if fresh {
		if err := h.initdb(ctx, dir, user); err != nil {
			return nil, err
		}
	}
	return h.Start(ctx, Service{
		Unit: unit,
		Command: []string{"postgres", "-D", dir,
			"-c", "listen_addresses=*",
			"-c", "port=" + strconv.Itoa(int(port)),
			"-c", "unix_socket_directories=" + dir,
			"-c", "fsync=off",
			"-c", "shared_buffers=16MB",
			"-c", "max_connections=300",
			"-c", "dynamic_shared_memory_type=mmap", // in the data directory, not in /dev/shm
		},
		User: user,
		Dir:  dir,
		// The System V segment goes with the namespace, also after kill -9.
		SysProcAttr: &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWIPC},
		Ports:       []uint16{port},
		Stop:        syscall.SIGINT, // "fast": does not wait for clients
		Ready: func(ctx context.Context) error {
			_, err := h.Output(ctx, "psql", "-h", dir, "-p", strconv.Itoa(int(port)), "-U", user, "-Atc", "select 1")
			return err
		},
	})
}

func (h *Host) initdb(ctx context.Context, dir, user string) error {
	cmd := h.Command(ctx, "initdb", "-D", dir, "-U", user, "-A", "trust", "--no-sync", "--locale=C", "-E", "UTF8")
	cmd.User, cmd.Dir = user, dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWIPC}
	if _, err := cmd.Output(); err != nil {
		return err
	}
	const trust = "local all all trust\nhost all all all trust\n"
	if err := os.WriteFile(filepath.Join(dir, "pg_hba.conf"), []byte(trust), 0o600); err != nil {
		return fmt.Errorf("netlab: %w", err)
	}
	return nil
}

// Redis starts Redis on IPv4 and IPv6, as the user redis of the machine, in
// memory only and without a password. The unit is redis-server.service.
func (h *Host) Redis(ctx context.Context, port uint16) (*Daemon, error) {
	const unit, user = "redis-server.service", "redis"
	dir, _, err := h.dataDir(unit, user)
	if err != nil {
		return nil, fmt.Errorf("netlab: redis on %s: %w", h.name, err)
	}
	return h.Start(ctx, Service{
		Unit: unit,
		Command: []string{"redis-server", "--port", strconv.Itoa(int(port)), "--bind", "* -::*",
			"--protected-mode", "no", "--save", "", "--appendonly", "no", "--dir", dir, "--daemonize", "no"},
		User:  user,
		Dir:   dir,
		Ports: []uint16{port},
	})
}

// MariaDB starts MariaDB on IPv4 and IPv6, as the user mysql of the machine, with
// data of its own: a protocol in which the server speaks first. The user "app"
// may do everything from anywhere, without a password, on the database "app".
// The unit is mariadb.service; starting it again keeps its data.
func (h *Host) MariaDB(ctx context.Context, port uint16) (*Daemon, error) {
	const unit, user = "mariadb.service", "mysql"
	dir, fresh, err := h.dataDir(unit, user)
	if err != nil {
		return nil, fmt.Errorf("netlab: mariadb on %s: %w", h.name, err)
	}
	setup := filepath.Join(filepath.Dir(dir), "setup.sql")
	if fresh {
		const sql = "CREATE DATABASE IF NOT EXISTS app;\n" +
			"CREATE USER IF NOT EXISTS app@'%';\n" +
			"GRANT ALL ON app.* TO app@'%';\n"
		if err := writeConfig(setup, sql); err != nil {
			return nil, fmt.Errorf("netlab: %w", err)
		}
		cmd := h.Command(ctx, "mariadb-install-db", "--no-defaults", "--datadir="+dir, "--tmpdir="+dir, "--skip-test-db", "--auth-root-authentication-method=normal")
		cmd.User, cmd.Dir = user, dir
		if _, err := cmd.Output(); err != nil {
			return nil, err
		}
	}
	return h.Start(ctx, Service{
		Unit: unit,
		// A tmpdir of its own: at its start it deletes every other's temporary tables.
		Command: []string{"mariadbd", "--no-defaults", "--datadir=" + dir, "--tmpdir=" + dir, "--port=" + strconv.Itoa(int(port)),
			"--bind-address=*", "--socket=" + filepath.Join(dir, "sock"), "--pid-file=" + filepath.Join(dir, "pid"),
			"--init-file=" + setup, "--skip-name-resolve", "--innodb-buffer-pool-size=16M",
			"--innodb-flush-log-at-trx-commit=0", "--innodb-use-native-aio=0"},
		User:  user,
		Dir:   dir,
		Ports: []uint16{port},
		Ready: func(ctx context.Context) error {
			_, err := h.Output(ctx, "mariadb", "--no-defaults", "--socket="+filepath.Join(dir, "sock"), "-u", "app", "-e", "select 1", "app")
			return err
		},
	})
}
