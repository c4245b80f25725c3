package identity

import (
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestUserDB(t *testing.T) {
	dir := t.TempDir()
	db := &userDB{passwd: filepath.Join(dir, "passwd"), group: filepath.Join(dir, "group")}
	write := func(name, text string, age time.Duration) {
		t.Helper()
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		when := time.Now().Add(-age)
		if err := os.Chtimes(name, when, when); err != nil {
			t.Fatal(err)
		}
	}
	check := func(uid uint32, want user) uint64 {
		t.Helper()
		got, serial, err := db.lookup(uid)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(want, got, cmp.AllowUnexported(user{})); d != "" {
			t.Errorf("uid %d (-want +got):\n%s", uid, d)
		}
		return serial
	}

	check(0, user{}) // a host without the files

	write(db.passwd, "root:x:0:0:root:/root:/bin/sh\n"+
		"toor:x:0:0:second name:/root:/bin/sh\n"+
		"web:x:33:33::/:/bin/false\n"+
		"broken line\nneg:x:-1:0::/:\nbig:x:4294967296:0::/:\n+nis:x:50:50::/:\n:x:51:51::/:\n", time.Hour)
	write(db.group, "root:x:0:\nweb:x:33:\nssl:x:7:nobody, web,web\nadm:x:4:web,toor\nbad:x:y:web\n+:::\n", time.Hour)
	check(0, user{"root", []string{"root"}})
	check(33, user{"web", []string{"adm", "ssl", "web"}})
	check(50, user{})
	check(51, user{})
	before := check(7, user{})
	if again := check(33, user{"web", []string{"adm", "ssl", "web"}}); again != before {
		t.Errorf("read again without a change: %d, then %d", before, again)
	}

	write(db.group, "web:x:33:\n", time.Minute)
	if after := check(33, user{"web", []string{"web"}}); after == before {
		t.Error("the change was not seen in the serial")
	}

	if err := os.Remove(db.passwd); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(db.passwd, 0o755); err != nil {
		t.Fatal(err)
	}
	if u, _, err := db.lookup(0); err == nil {
		t.Errorf("an unreadable database answered %+v", u)
	}
}

// Who asks often does not look at the files as often, but soon enough.
func TestUserDBIsFresh(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		db := &userDB{passwd: filepath.Join(dir, "passwd"), group: filepath.Join(dir, "group"), fresh: usersFresh}
		is := func(want string) {
			t.Helper()
			if got, _, err := db.lookup(7); err != nil || got.name != want {
				t.Errorf("user 7 is %q, %v, want %q", got.name, err, want)
			}
		}
		write := func(name string) {
			t.Helper()
			if err := os.WriteFile(db.passwd, []byte(name+":x:7:7::/:/bin/sh\n"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		write("one")
		is("one")
		write("eleven")
		time.Sleep(usersFresh - time.Nanosecond)
		is("one")
		time.Sleep(time.Nanosecond)
		is("eleven")
		if err := os.Remove(db.passwd); err != nil {
			t.Fatal(err)
		}
		time.Sleep(usersFresh)
		is("")
	})
}
