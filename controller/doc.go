// Package controller is the control plane of one trust domain.
//
// It holds the resources of policydb, the certificate authority (package ca) and
// the hosts; it enrols hosts by join token (package enrol is their side of it),
// signs the SVIDs of their workloads, pushes to each host the policy that it can
// need, takes in flow records, and answers operators. All of its state is in a
// Store (package store); flow records and who is connected live in memory.
//
//	cfg, err := controller.LoadConfig(file, os.LookupEnv, flags)
//	err = controller.Run(ctx, cfg, controller.Options{Logger: log})
//
// One TLS port serves three services, gRPC and Connect alike:
//
//	EnrolmentService  open, rate limited: the join token is the proof
//	ProxyService      hosts, by their SVID; a host that was removed is refused
//	AdminService      operators, by bearer token
//
// What a host may assert ends here: it reports os.*, proc.*, container.*, k8s.* and
// image.* of its workloads; host.* comes from its enrolment, and labels, names and
// namespaces from Profiles.
package controller
