package keyring

import (
	"errors"
	"fmt"
	"os"
	"testing"
	"time"
)

func TestSaveLoadRemove(t *testing.T) {
	name := fmt.Sprintf("symbolon-test:%d", os.Getpid())
	t.Cleanup(func() { Remove(name) })
	if _, err := Load(name); !errors.Is(err, ErrNotFound) {
		t.Fatalf("before Save: %v, want ErrNotFound", err)
	}
	for _, secret := range []string{"one", "a longer second one"} {
		if err := Save(name, []byte(secret), time.Minute); err != nil {
			t.Fatal(err)
		}
		got, err := Load(name)
		if err != nil || string(got) != secret {
			t.Fatalf("Load = %q, %v, want %q", got, err, secret)
		}
	}
	if err := Remove(name); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(name); !errors.Is(err, ErrNotFound) {
		t.Fatalf("after Remove: %v, want ErrNotFound", err)
	}
	if err := Remove(name); err != nil {
		t.Fatalf("second Remove: %v", err)
	}
	if err := Save(name, make([]byte, MaxSize+1), time.Minute); err == nil {
		t.Fatal("a secret over MaxSize was kept")
	}
}
