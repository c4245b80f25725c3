package redirect

import (
	"fmt"

	"github.com/cilium/ebpf/btf"
)

// kernelOffsets are where the running kernel keeps what a connect record is made of,
// in bytes from the beginning of each struct. They differ from build to build; the
// kernel's own description (BTF) tells them.
type kernelOffsets struct {
	leader, mm, tgid, start, comm   int16 // in struct task_struct
	realCred, cred, cgroups         int16
	ruid, euid                      int16 // in struct cred
	exeFile                         int16 // in struct mm_struct
	inode                           int16 // in struct file
	super, ino, size                int16 // in struct inode
	mtime, mtimeNsec                int16
	ctime, ctimeNsec                int16
	dev                             int16 // in struct super_block
	defaultCgroup, kernfs, kernfsID int16 // in struct css_set, cgroup, kernfs_node
	sockUID, sockCgroup             int16 // in struct sock
}

// readOffsets asks the kernel, which takes some 50 ms and is done once.
func readOffsets() (*kernelOffsets, error) {
	spec, err := btf.LoadKernelSpec()
	if err != nil {
		return nil, fmt.Errorf("the kernel's types: %w", err)
	}
	t := new(kernelOffsets)
	for _, f := range []struct {
		to   *int16
		of   string
		path [][]string // alternatives; of each the members to follow
	}{
		{&t.leader, "task_struct", [][]string{{"group_leader"}}},
		{&t.mm, "task_struct", [][]string{{"mm"}}},
		{&t.tgid, "task_struct", [][]string{{"tgid"}}},
		{&t.start, "task_struct", [][]string{{"start_boottime"}}},
		{&t.comm, "task_struct", [][]string{{"comm"}}},
		{&t.realCred, "task_struct", [][]string{{"real_cred"}}},
		{&t.cred, "task_struct", [][]string{{"cred"}}},
		{&t.cgroups, "task_struct", [][]string{{"cgroups"}}},
		{&t.ruid, "cred", [][]string{{"uid"}}},
		{&t.euid, "cred", [][]string{{"euid"}}},
		{&t.exeFile, "mm_struct", [][]string{{"exe_file"}}},
		{&t.inode, "file", [][]string{{"f_inode"}}},
		{&t.super, "inode", [][]string{{"i_sb"}}},
		{&t.dev, "super_block", [][]string{{"s_dev"}}},
		{&t.ino, "inode", [][]string{{"i_ino"}}},
		{&t.size, "inode", [][]string{{"i_size"}}},
		// A timespec64 until Linux 6.10, under two names.
		{&t.mtime, "inode", [][]string{{"i_mtime_sec"}, {"__i_mtime", "tv_sec"}, {"i_mtime", "tv_sec"}}},
		{&t.mtimeNsec, "inode", [][]string{{"i_mtime_nsec"}, {"__i_mtime", "tv_nsec"}, {"i_mtime", "tv_nsec"}}},
		{&t.ctime, "inode", [][]string{{"i_ctime_sec"}, {"__i_ctime", "tv_sec"}, {"i_ctime", "tv_sec"}}},
		{&t.ctimeNsec, "inode", [][]string{{"i_ctime_nsec"}, {"__i_ctime", "tv_nsec"}, {"i_ctime", "tv_nsec"}}},
		{&t.defaultCgroup, "css_set", [][]string{{"dfl_cgrp"}}},
		{&t.kernfs, "cgroup", [][]string{{"kn"}}},
		{&t.kernfsID, "kernfs_node", [][]string{{"id"}}},
		{&t.sockUID, "sock", [][]string{{"sk_uid"}}},
		// A pointer since Linux 5.16; before, a number that says what it is.
		{&t.sockCgroup, "sock", [][]string{{"sk_cgrp_data", "cgroup"}}},
	} {
		var s *btf.Struct
		if err := spec.TypeByName(f.of, &s); err != nil {
			return nil, fmt.Errorf("the kernel's struct %s: %w", f.of, err)
		}
		found := false
		for _, path := range f.path {
			if *f.to, found = offsetOf(s, path); found {
				break
			}
		}
		if !found {
			return nil, fmt.Errorf("the kernel's struct %s has no %v", f.of, f.path[0])
		}
	}
	return t, nil
}

// offsetOf follows a path of members, whose last part may not be a bit field.
func offsetOf(t btf.Type, path []string) (int16, bool) {
	var members []btf.Member
	switch t := btf.UnderlyingType(t).(type) {
	case *btf.Struct:
		members = t.Members
	case *btf.Union:
		members = t.Members
	}
	for _, m := range members {
		rest := path
		switch m.Name {
		case path[0]:
			rest = path[1:]
		case "": // its members count as the outer struct's
		default:
			continue
		}
		inner := int16(0)
		if len(rest) > 0 {
			var ok bool
			if inner, ok = offsetOf(m.Type, rest); !ok {
				continue
			}
		}
		at := int(m.Offset.Bytes()) + int(inner)
		if m.BitfieldSize != 0 || at > 1<<15-1 {
			return 0, false
		}
		return int16(at), true
	}
	return 0, false
}
