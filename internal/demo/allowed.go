package main

import (
	"context"
	"fmt"
	"time"
)

// allowed shows what policy lets through, and how.
func (d *demo) allowed(ctx context.Context) error {
	d.heading("Allowed, and encrypted", "The same two commands again. Nothing was changed in curl, nginx, psql or PostgreSQL.")
	since := time.Now()
	if err := d.fetch(ctx, directURL); err != nil {
		return err
	}
	page, err := d.both(ctx, d.serverProxy, since, serverAddr, webPort)
	if err != nil {
		return err
	}
	d.directFlow = page.server
	d.print(page.client)
	if err := d.encrypted(page, "report", "web", "/acme/prod/report-reads-web"); err != nil {
		return err
	}
	since = time.Now()
	if err := d.ask(ctx); err != nil {
		return err
	}
	answer, err := d.both(ctx, d.serverProxy, since, serverAddr, dbPort)
	if err != nil {
		return err
	}
	d.print(answer.client)
	if err := d.encrypted(answer, "analyst", "db", "/acme/prod/analyst-queries-db"); err != nil {
		return err
	}
	d.meaning("Two proxies proved to each other whom they speak for, both sides' policy agreed, and only then did a byte pass.")
	return nil
}

func (d *demo) encrypted(p pair, from, to, policy string) error {
	return d.claim(p.encrypted(from, to, policy),
		fmt.Sprintf("both proxies recorded it: %s to %s, allowed by %s, encrypted", from, to, policy), p)
}
