// Package cloudlab is a cloud for tests: roots and keys of its own, which sign instance
// documents of the shape that AWS, GCP and Azure give theirs, and a metadata service that
// hands them out and asks for the same headers.
//
//	aws, err := cloudlab.NewAWS()
//	os.WriteFile(file, aws.Certificates(), 0o600) // what a controller believes
//	go http.Serve(listener, &cloudlab.Service{AWS: func() ([]byte, error) { return aws.Document(aws.Instance("i-0a1b")) }})
//
// It signs anything, forgeries included. Keys live in memory.
package cloudlab
