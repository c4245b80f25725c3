package redirect

import (
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
)

// The programs are two. connect runs in connect(2), while the kernel holds the
// socket's lock, and writes down the calling process beside the socket. handshake
// runs when a handshake ends. At the client's end, which is first, it publishes that
// record under what both ends of the handshake know: the client's address, and the
// sequence number of its first byte, which the kernel draws (not the port, which is
// rewritten where two connections from one port meet in our listener). At the end of
// the proxy's listener it takes the record from there and puts it beside the accepted
// socket. Two handshakes under way with one number in 2^32 could be confused; their
// records differ in the ports, which whoever reads one compares.
//
// What stands beside a socket goes with it, and no other process can push it out.
// What is published waits for microseconds; if a flood of handshakes pushes it out
// meanwhile, the accepted socket has no record.

// Layout of a record, in bytes.
const (
	recTGID       = 0   // u32, in the initial PID namespace
	recRUID       = 4   // u32: the process's own credentials, real and effective
	recEUID       = 8   // u32
	recActingRUID = 12  // u32: those that it acts with now (io_uring's personalities)
	recActingEUID = 16  // u32
	recSockUID    = 20  // u32: who made the socket
	recCgroup     = 24  // u64: where the process is
	recSockCgroup = 32  // u64: where the socket was made
	recStart      = 40  // u64: start of the process, ns since boot
	recCookie     = 48  // u64: of the socket
	recExeIno     = 56  // u64
	recExeSize    = 64  // u64
	recExeMtime   = 72  // u64: seconds
	recExeCtime   = 80  // u64
	recExeMtimeNs = 88  // u32
	recExeCtimeNs = 92  // u32
	recExeDev     = 96  // u32, the kernel's encoding
	recDstPort    = 100 // u32
	recKey        = 104 // the key below: the client's address
	recSrcPort    = 124 // u32
	recDst        = 128 // 16 bytes: the destination, as the client sees it
	recComm       = 144 // 16 bytes
	recLen        = 160
)

// Layout of the key that both ends of a handshake know.
const (
	keyAddr = 0  // 16 bytes; IPv4 in mapped form
	keySeq  = 16 // u32
	keyLen  = 20
)

// maxHandshakes is how many records wait for the other end of their handshake.
// Those of connections that do not lead to the proxy stay until they are pushed out.
const maxHandshakes = 16384

const (
	// programLicense: the kernel lets only such programs read its memory. It is the
	// licence of these programs alone.
	programLicense = "Dual BSD/GPL"

	storageCreate = 1 // BPF_SK_STORAGE_GET_F_CREATE
	noPrealloc    = 1 // BPF_F_NO_PREALLOC, which socket storage demands
)

// struct bpf_sock_addr, linux/bpf.h
const (
	sockAddrProtocol = 36
	sockAddrSock     = 64
	sockMark         = 16 // struct bpf_sock
)

// struct bpf_sock_ops, linux/bpf.h
const (
	opsOp         = 0
	opsFamily     = 20
	opsRemoteIP4  = 24
	opsLocalIP4   = 28
	opsRemoteIP6  = 32
	opsLocalIP6   = 48
	opsRemotePort = 64
	opsLocalPort  = 68
	opsRcvNxt     = 100
	opsSndUna     = 108
	opsSock       = 184

	opActiveEstablished  = 4 // BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB
	opPassiveEstablished = 5 // BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB
)

// connectMaps are what the programs write.
type connectMaps struct {
	callers    *ebpf.Map // socket of a client -> record
	handshakes *ebpf.Map // key -> record
	accepted   *ebpf.Map // socket of the proxy -> record
}

func newConnectMaps() (m connectMaps, err error) {
	defer func() {
		if err != nil {
			m.close()
		}
	}()
	// Socket storage must be described; its key is a descriptor.
	number := &btf.Int{Name: "int", Size: 4, Encoding: btf.Signed}
	octet := &btf.Int{Name: "unsigned char", Size: 1}
	record := &btf.Struct{Name: "connect_record", Size: recLen, Members: []btf.Member{
		{Name: "bytes", Type: &btf.Array{Index: number, Type: octet, Nelems: recLen}},
	}}
	storage := func(name string) *ebpf.MapSpec {
		return &ebpf.MapSpec{
			Name: name, Type: ebpf.SkStorage, KeySize: 4, ValueSize: recLen, Flags: noPrealloc,
			Key: number, Value: record,
		}
	}
	if m.callers, err = ebpf.NewMap(storage("sl_callers")); err != nil {
		return m, err
	}
	if m.accepted, err = ebpf.NewMap(storage("sl_accepted")); err != nil {
		return m, err
	}
	m.handshakes, err = ebpf.NewMap(&ebpf.MapSpec{
		Name: "sl_handshakes", Type: ebpf.LRUHash, KeySize: keyLen, ValueSize: recLen, MaxEntries: maxHandshakes,
	})
	return m, err
}

func (m connectMaps) close() {
	for _, x := range []*ebpf.Map{m.callers, m.handshakes, m.accepted} {
		x.Close() // nil is closed
	}
}

// connectProgram records the caller beside its socket. netns is the cookie of the
// network namespace that is served, pid the proxy's own process, whose marked sockets
// need no record.
func connectProgram(m connectMaps, o *kernelOffsets, netns uint64, pid int) asm.Instructions {
	const (
		ctx, sock, rec, task = asm.R6, asm.R7, asm.R8, asm.R9
		pointer              = -8  // on the stack: the last one that was followed
		word                 = -16 // a number that was read
	)
	p := program{
		asm.Mov.Reg(ctx, asm.R1),
		asm.LoadMem(asm.R1, ctx, sockAddrProtocol, asm.Word),
		asm.JNE.Imm(asm.R1, 6, "out"), // IPPROTO_TCP
	}
	p.inNamespace(ctx, netns)
	p.add(
		asm.LoadMem(sock, ctx, sockAddrSock, asm.DWord),
		asm.JEq.Imm(sock, 0, "out"),
		asm.FnGetCurrentTask.Call(),
		asm.Mov.Reg(task, asm.R0),
		// The proxy's own: by mark and process, since a mark alone can be forged.
		asm.LoadMem(asm.R1, sock, sockMark, asm.Word),
		asm.RSh.Imm(asm.R1, 16),
		asm.JNE.Imm(asm.R1, MarkTunnel>>16, "record"),
	)
	read := func(to asm.Register, at int16, size int32, from asm.Register, offset int16) {
		p.add(
			asm.Mov.Reg(asm.R1, to), asm.Add.Imm(asm.R1, int32(at)),
			asm.Mov.Imm(asm.R2, size),
			asm.Mov.Reg(asm.R3, from), asm.Add.Imm(asm.R3, int32(offset)),
			asm.FnProbeReadKernel.Call(), // zeroes on failure
		)
	}
	// follow loads the pointer at from+offset into to. Nil is followed like any
	// other: the kernel reads zeroes there.
	follow := func(to, from asm.Register, offset int16) {
		read(asm.R10, pointer, 8, from, offset)
		p.add(asm.LoadMem(to, asm.R10, pointer, asm.DWord))
	}
	read(asm.R10, word, 4, task, o.tgid)
	p.add(
		asm.LoadMem(asm.R1, asm.R10, word, asm.Word),
		asm.JEq.Imm(asm.R1, int32(pid), "out"),

		asm.LoadMapPtr(asm.R1, m.callers.FD()).WithSymbol("record"),
		asm.Mov.Reg(asm.R2, sock),
		asm.Mov.Imm(asm.R3, 0),
		asm.Mov.Imm(asm.R4, storageCreate),
		asm.FnSkStorageGet.Call(),
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.Mov.Reg(rec, asm.R0),
		asm.Mov.Reg(asm.R1, ctx),
		asm.FnGetSocketCookie.Call(),
		asm.StoreMem(rec, recCookie, asm.R0, asm.DWord),
		// A typed pointer to the socket, with which one may calculate. One that is no TCP
		// socket leaves no caller.
		asm.Mov.Imm(asm.R1, 0),
		asm.StoreMem(rec, recTGID, asm.R1, asm.Word),
		asm.Mov.Reg(asm.R1, sock),
		asm.FnSkcToTcpSock.Call(),
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.Mov.Reg(sock, asm.R0),
	)
	read(rec, recSockUID, 4, sock, o.sockUID)
	follow(ctx, sock, o.sockCgroup) // the context is not needed any more
	follow(ctx, ctx, o.kernfs)
	read(rec, recSockCgroup, 8, ctx, o.kernfsID)

	read(rec, recComm, 16, task, o.comm)
	follow(ctx, task, o.realCred)
	read(rec, recRUID, 4, ctx, o.ruid)
	read(rec, recEUID, 4, ctx, o.euid)
	follow(ctx, task, o.cred)
	read(rec, recActingRUID, 4, ctx, o.ruid)
	read(rec, recActingEUID, 4, ctx, o.euid)
	follow(ctx, task, o.leader)
	read(rec, recStart, 8, ctx, o.start)
	follow(ctx, task, o.cgroups)
	follow(ctx, ctx, o.defaultCgroup)
	follow(ctx, ctx, o.kernfs)
	read(rec, recCgroup, 8, ctx, o.kernfsID)

	follow(ctx, task, o.mm)
	follow(ctx, ctx, o.exeFile)
	follow(ctx, ctx, o.inode)
	read(rec, recExeIno, 8, ctx, o.ino)
	read(rec, recExeSize, 8, ctx, o.size)
	read(rec, recExeMtime, 8, ctx, o.mtime)
	read(rec, recExeMtimeNs, 4, ctx, o.mtimeNsec)
	read(rec, recExeCtime, 8, ctx, o.ctime)
	read(rec, recExeCtimeNs, 4, ctx, o.ctimeNsec)
	follow(ctx, ctx, o.super)
	read(rec, recExeDev, 4, ctx, o.dev)
	read(rec, recTGID, 4, task, o.tgid) // last: until now there was no record
	p.end()
	return asm.Instructions(p)
}

// handshakeProgram hands the record over from the client's socket to the accepted
// one, for listeners on port in the network namespace with cookie netns.
func handshakeProgram(m connectMaps, netns uint64, port uint16) asm.Instructions {
	const (
		ctx, sock, rec, copied = asm.R6, asm.R7, asm.R8, asm.R9
		key                    = -24 // on the stack
	)
	p := program{asm.Mov.Reg(ctx, asm.R1)}
	p.add(
		asm.LoadMem(asm.R1, ctx, opsOp, asm.Word),
		asm.JEq.Imm(asm.R1, opActiveEstablished, "established"),
		asm.JNE.Imm(asm.R1, opPassiveEstablished, "out"),
		asm.LoadMem(asm.R1, ctx, opsLocalPort, asm.Word),
		asm.JNE.Imm(asm.R1, int32(port), "out"),
		asm.LoadMem(sock, ctx, opsSock, asm.DWord).WithSymbol("established"),
		asm.JEq.Imm(sock, 0, "out"),
	)
	p.inNamespace(ctx, netns)
	p.add(
		asm.LoadMem(asm.R1, ctx, opsOp, asm.Word),
		asm.JEq.Imm(asm.R1, opPassiveEstablished, "passive"),
		// The client's end.
		asm.LoadMapPtr(asm.R1, m.callers.FD()),
		asm.Mov.Reg(asm.R2, sock),
		asm.Mov.Imm(asm.R3, 0),
		asm.Mov.Imm(asm.R4, 0),
		asm.FnSkStorageGet.Call(),
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.Mov.Reg(rec, asm.R0),
	)
	p.address("source", rec, recKey+keyAddr, ctx, opsLocalIP4, opsLocalIP6)
	p.address("destination", rec, recDst, ctx, opsRemoteIP4, opsRemoteIP6)
	p.add(
		asm.LoadMem(asm.R1, ctx, opsLocalPort, asm.Word),
		asm.StoreMem(rec, recSrcPort, asm.R1, asm.Word),
		asm.LoadMem(asm.R1, ctx, opsRemotePort, asm.Word),
		asm.HostTo(asm.BE, asm.R1, asm.Word),
		asm.StoreMem(rec, recDstPort, asm.R1, asm.Word),
		asm.LoadMem(asm.R1, ctx, opsSndUna, asm.Word),
		asm.StoreMem(rec, recKey+keySeq, asm.R1, asm.Word),
		asm.LoadMapPtr(asm.R1, m.handshakes.FD()),
		asm.Mov.Reg(asm.R2, rec), asm.Add.Imm(asm.R2, recKey),
		asm.Mov.Reg(asm.R3, rec),
		asm.Mov.Imm(asm.R4, 0), // BPF_ANY
		asm.FnMapUpdateElem.Call(),
		asm.Ja.Label("out"),
	)
	// The proxy's end.
	p.add(asm.Mov.Reg(asm.R1, ctx).WithSymbol("passive"))
	p.address("peer", asm.R10, key+keyAddr, ctx, opsRemoteIP4, opsRemoteIP6)
	p.add(
		asm.LoadMem(asm.R1, ctx, opsRcvNxt, asm.Word),
		asm.StoreMem(asm.R10, key+keySeq, asm.R1, asm.Word),
	)
	lookup := func() {
		p.add(
			asm.LoadMapPtr(asm.R1, m.handshakes.FD()),
			asm.Mov.Reg(asm.R2, asm.R10), asm.Add.Imm(asm.R2, key),
			asm.FnMapLookupElem.Call(),
		)
	}
	lookup()
	p.add(
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.Mov.Reg(rec, asm.R0),
		asm.LoadMapPtr(asm.R1, m.accepted.FD()),
		asm.Mov.Reg(asm.R2, sock),
		asm.Mov.Reg(asm.R3, rec), // copied from
		asm.Mov.Imm(asm.R4, storageCreate),
		asm.FnSkStorageGet.Call(),
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.Mov.Reg(copied, asm.R0),
	)
	// An entry that is pushed out is used again at once, perhaps while it was copied. A
	// key is published once; if it is there still, it was there all the time.
	lookup()
	p.add(
		asm.JNE.Imm(asm.R0, 0, "whole"),
		asm.Mov.Imm(asm.R1, 0),
		asm.StoreMem(copied, recTGID, asm.R1, asm.Word),
		asm.Ja.Label("out"),
		asm.LoadMapPtr(asm.R1, m.handshakes.FD()).WithSymbol("whole"),
		asm.Mov.Reg(asm.R2, asm.R10), asm.Add.Imm(asm.R2, key),
		asm.FnMapDeleteElem.Call(),
	)
	p.end()
	return asm.Instructions(p)
}

// program is one in the making. Its last label is "out", where it allows the call.
type program asm.Instructions

func (p *program) add(i ...asm.Instruction) { *p = append(*p, i...) }

func (p *program) end() {
	p.add(asm.Mov.Imm(asm.R0, 1).WithSymbol("out"), asm.Return())
}

// inNamespace leaves the program if its socket is in another network namespace.
func (p *program) inNamespace(ctx asm.Register, cookie uint64) {
	p.add(
		asm.Mov.Reg(asm.R1, ctx),
		asm.FnGetNetnsCookie.Call(),
		asm.LoadImm(asm.R1, int64(cookie), asm.DWord),
		asm.JNE.Reg(asm.R0, asm.R1, "out"),
	)
}

// address writes one of the socket's addresses, in IPv6 form, to 16 bytes at to+at.
func (p *program) address(name string, to asm.Register, at int16, ctx asm.Register, ip4, ip6 int16) {
	p.add(
		asm.LoadMem(asm.R1, ctx, opsFamily, asm.Word),
		asm.JEq.Imm(asm.R1, 2, name+"4"), // AF_INET
	)
	for i := int16(0); i < 16; i += 4 {
		p.add(
			asm.LoadMem(asm.R1, ctx, ip6+i, asm.Word),
			asm.StoreMem(to, at+i, asm.R1, asm.Word),
		)
	}
	p.add(
		asm.Ja.Label(name+"-done"),
		asm.Mov.Imm(asm.R1, 0).WithSymbol(name+"4"),
		asm.StoreMem(to, at, asm.R1, asm.Word),
		asm.StoreMem(to, at+4, asm.R1, asm.Word),
		asm.Mov.Imm(asm.R1, 0xffff),
		asm.HostTo(asm.BE, asm.R1, asm.Word),
		asm.StoreMem(to, at+8, asm.R1, asm.Word),
		asm.LoadMem(asm.R1, ctx, ip4, asm.Word),
		asm.StoreMem(to, at+12, asm.R1, asm.Word),
		// Something to jump to.
		asm.Mov.Imm(asm.R1, 0).WithSymbol(name+"-done"),
	)
}

func loadProgram(name string, kind ebpf.ProgramType, attach ebpf.AttachType, code asm.Instructions) (*ebpf.Program, error) {
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: name, Type: kind, AttachType: attach, Instructions: code, License: programLicense,
	})
	if err != nil {
		return nil, fmt.Errorf("program %s: %w", name, err)
	}
	return p, nil
}
