package ca

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/symbolon/symbolon/controller/store"
)

// keyValidity is not under ca/, where keys lie.
const keyValidity = "ca-validity"

// validity bounds how long anything that was ever signed is valid: TTL from now, or
// Until, for what was signed while the TTL was longer.
type validity struct {
	TTL   time.Duration `json:"ttl"`
	Until time.Time     `json:"until"`
}

// openValidity notes a TTL that is shorter than the last one.
func (c *CA) openValidity(ctx context.Context) error {
	kv, err := c.store.Get(ctx, keyValidity)
	switch {
	case errors.Is(err, store.ErrNotFound):
	case err != nil:
		return fmt.Errorf("ca: %w", err)
	default:
		if err := json.Unmarshal(kv.Value, &c.validity); err != nil {
			return fmt.Errorf("ca: %s: %w", keyValidity, err)
		}
	}
	if c.validity.TTL == c.cfg.TTL {
		return nil
	}
	if until := c.cfg.Now().Add(c.validity.TTL); until.After(c.validity.Until) {
		c.validity.Until = until
	}
	c.validity.TTL = c.cfg.TTL
	v, err := json.Marshal(c.validity)
	if err != nil {
		return fmt.Errorf("ca: %w", err)
	}
	if _, _, err := c.store.Txn(ctx, nil, []store.Op{store.Put(keyValidity, v)}); err != nil {
		return fmt.Errorf("ca: %w", err)
	}
	return nil
}

// ValidUntil is when nothing that was signed up to now is valid any more.
func (c *CA) ValidUntil() time.Time {
	until := c.cfg.Now().Add(c.cfg.TTL)
	if c.validity.Until.After(until) {
		return c.validity.Until
	}
	return until
}
