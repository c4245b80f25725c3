package controller

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"connectrpc.com/connect"
	"go.uber.org/zap"
	"google.golang.org/protobuf/types/known/timestamppb"

	symbolonv1 "github.com/symbolon/symbolon/api/symbolon/v1"
	"github.com/symbolon/symbolon/identity"
)

const (
	// maxFindings bounds one push.
	maxFindings    = 1000
	defaultScanTTL = 24 * time.Hour
	minScanTTL     = time.Minute
	maxScanTTL     = 90 * 24 * time.Hour
)

// PushScan takes what a scanner found, and tells the hosts that it is about.
func (s adminService) PushScan(ctx context.Context, req *connect.Request[symbolonv1.PushScanRequest]) (*connect.Response[symbolonv1.PushScanResponse], error) {
	m := req.Msg
	if err := checkScanner(m.GetScanner()); err != nil {
		return nil, err
	}
	ttl := defaultScanTTL
	if m.GetTtl() != nil {
		ttl = m.GetTtl().AsDuration()
	}
	if ttl < minScanTTL || ttl > maxScanTTL {
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("ttl %v: want between %v and %v", ttl, minScanTTL, maxScanTTL))
	}
	if n := len(m.GetFindings()); n == 0 || n > maxFindings {
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("%d findings: want 1 to %d", n, maxFindings))
	}
	now := s.opts.Now()
	seen := make(map[string]int)
	var records []*scanRecord
	for i, f := range m.GetFindings() {
		bad := func(err error) error {
			return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("finding %d: %w", i+1, err))
		}
		subject, err := scanSubject(f.GetExeSha256(), f.GetImageDigest())
		if err != nil {
			return nil, bad(err)
		}
		if other, twice := seen[subject]; twice {
			return nil, bad(fmt.Errorf("finding %d is about the same one", other))
		}
		seen[subject] = i + 1
		attrs := identity.AttributesFromProto(f.GetAttributes())
		if err := checkScan(attrs); err != nil {
			return nil, bad(err)
		}
		records = append(records, &scanRecord{
			Subject: subject, Scanner: m.GetScanner(), Actor: actorOf(req.Peer()), Attributes: attrs, Pushed: now, Until: now.Add(ttl),
		})
	}
	changed, err := s.scans.push(ctx, records)
	if errors.Is(err, errScansFull) {
		return nil, connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("%w; remove some ('symbolon scan remove') or let them end sooner", err))
	}
	if err != nil {
		return nil, s.internal("push scan", err)
	}
	hosts := s.reissueFor(changed)
	s.log.Info("scan pushed", zap.String("scanner", m.GetScanner()), zap.String("actor", actorOf(req.Peer())),
		zap.Int("findings", len(records)), zap.Int("changed", len(changed)), zap.Int("hosts", hosts))
	return connect.NewResponse(&symbolonv1.PushScanResponse{
		Changed: uint32(len(changed)), Hosts: uint32(hosts), Until: timestamppb.New(now.Add(ttl)),
	}), nil
}

// ListScans is what is in force.
func (s adminService) ListScans(context.Context, *connect.Request[symbolonv1.ListScansRequest]) (*connect.Response[symbolonv1.ListScansResponse], error) {
	res := &symbolonv1.ListScansResponse{}
	for _, r := range s.scans.list() {
		f := &symbolonv1.ScanFinding{Attributes: r.Attributes.Proto()}
		if exe, ok := strings.CutPrefix(r.Subject, exeSubject); ok {
			f.ExeSha256 = exe
		} else {
			f.ImageDigest = strings.TrimPrefix(r.Subject, imageSubject)
		}
		res.Scans = append(res.Scans, &symbolonv1.Scan{
			Finding: f, Scanner: r.Scanner, Actor: r.Actor, Pushed: timestamppb.New(r.Pushed), Until: timestamppb.New(r.Until),
		})
	}
	return connect.NewResponse(res), nil
}

// RemoveScans takes findings back before they end.
func (s adminService) RemoveScans(ctx context.Context, req *connect.Request[symbolonv1.RemoveScansRequest]) (*connect.Response[symbolonv1.RemoveScansResponse], error) {
	m := req.Msg
	subject := ""
	if m.GetExeSha256() != "" || m.GetImageDigest() != "" {
		var err error
		if subject, err = scanSubject(m.GetExeSha256(), m.GetImageDigest()); err != nil {
			return nil, connect.NewError(connect.CodeInvalidArgument, err)
		}
	}
	if subject == "" && m.GetScanner() == "" {
		return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("say whose findings or what about: scanner, exe_sha256 or image_digest"))
	}
	var records []*scanRecord
	for _, r := range s.scans.list() {
		if (subject == "" || r.Subject == subject) && (m.GetScanner() == "" || r.Scanner == m.GetScanner()) {
			records = append(records, r)
		}
	}
	if len(records) == 0 {
		return nil, connect.NewError(connect.CodeNotFound, errors.New("there is no such finding"))
	}
	changed, err := s.scans.remove(ctx, records)
	if err != nil {
		return nil, s.internal("remove scans", err)
	}
	hosts := s.reissueFor(changed)
	s.log.Info("scans removed", zap.String("actor", actorOf(req.Peer())), zap.Int("findings", len(records)), zap.Int("hosts", hosts))
	return connect.NewResponse(&symbolonv1.RemoveScansResponse{Removed: uint32(len(records)), Hosts: uint32(hosts)}), nil
}

func checkScanner(name string) error {
	if name == "" || len(name) > maxLabelKey || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789._-") != "" {
		return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("scanner %.80q: want the scanner's name, up to %d of a-z, 0-9, '.', '_' and '-'", name, maxLabelKey))
	}
	return nil
}
