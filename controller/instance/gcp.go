package instance

import (
	"crypto/rsa"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/symbolon/symbolon/controller/enrol"
	"github.com/symbolon/symbolon/identity/cloud"
)

const (
	gcpIssuer = "https://accounts.google.com"
	// gcpLife is for how long Google's tokens are good.
	gcpLife = time.Hour
)

// GCP believes instance identity tokens.
// https://cloud.google.com/compute/docs/instances/verifying-instance-identity
type GCP struct {
	// JWKSFile has Google's keys, as https://www.googleapis.com/oauth2/v3/certs serves
	// them. They change every few days: something has to fetch them.
	JWKSFile string `yaml:"jwks_file"`
	// Projects are the IDs or numbers of those whose instances are let in; none: none.
	Projects []string `yaml:"projects"`
	// Regions are those of the instances; none: all.
	Regions []string `yaml:"regions"`
}

var _ Authority = (*GCP)(nil)

// gcpClaims is what we read of a token beside the registered claims. Only the metadata
// service puts the google claim in: tokens that a service account has made for itself,
// for any audience it likes, lack it.
type gcpClaims struct {
	Google struct {
		ComputeEngine struct {
			ProjectID     string `json:"project_id"`
			ProjectNumber int64  `json:"project_number"`
			Zone          string `json:"zone"`
			InstanceID    string `json:"instance_id"`
			InstanceName  string `json:"instance_name"`
		} `json:"compute_engine"`
	} `json:"google"`
}

// Provider is cloud.GCP.
func (*GCP) Provider() string { return cloud.GCP }

// Check reads the keys.
func (a *GCP) Check() error { _, err := a.keys(); return err }

func (a *GCP) keys() (map[string]*rsa.PublicKey, error) {
	data, err := read(a.JWKSFile)
	if err != nil {
		return nil, err
	}
	var set jose.JSONWebKeySet
	if err := json.Unmarshal(data, &set); err != nil {
		return nil, fmt.Errorf("%w: %s is no JSON Web Key Set: %w", ErrAnchors, a.JWKSFile, err)
	}
	keys := make(map[string]*rsa.PublicKey)
	for _, k := range set.Keys {
		key, ok := k.Key.(*rsa.PublicKey)
		if !ok || k.KeyID == "" || enrol.CheckKey(key) != nil {
			return nil, fmt.Errorf("%w: %s: a key in it is no public RSA key with an ID", ErrAnchors, a.JWKSFile)
		}
		keys[k.KeyID] = key
	}
	if len(keys) == 0 {
		return nil, fmt.Errorf("%w: %s holds no key", ErrAnchors, a.JWKSFile)
	}
	return keys, nil
}

// Verify judges the signature, then the token by challenge, time and project.
func (a *GCP) Verify(document []byte, challenge cloud.Challenge, now time.Time) (*Instance, error) {
	keys, err := a.keys()
	if err != nil {
		return nil, err
	}
	// The algorithm is ours to say: a token names "none", or HMAC by the public key.
	token, err := jwt.ParseSigned(string(document), []jose.SignatureAlgorithm{jose.RS256})
	if err != nil || len(token.Headers) != 1 {
		return nil, refuse("it is no JWT with one RS256 signature")
	}
	key, ok := keys[token.Headers[0].KeyID]
	if !ok {
		return nil, errSignature
	}
	var claims jwt.Claims
	var google gcpClaims
	if token.Claims(key, &claims, &google) != nil {
		return nil, errSignature
	}
	e := google.Google.ComputeEngine
	switch {
	case claims.Issuer != gcpIssuer:
		return nil, refuse("it is not issued by %s", gcpIssuer)
	case challenge.Audience == "" || len(claims.Audience) != 1 || claims.Audience[0] != challenge.Audience:
		return nil, refuse("it was not asked for on this connection: the audience is another")
	case claims.Expiry == nil || claims.IssuedAt == nil || now.Add(leeway).Before(claims.IssuedAt.Time()) || !now.Before(claims.Expiry.Time()):
		return nil, refuse("it is not valid at this time")
	case claims.Expiry.Time().Sub(claims.IssuedAt.Time()) > gcpLife+leeway:
		return nil, refuse("it is good for longer than Google's are")
	case !word(e.ProjectID) || !word(e.Zone) || !word(e.InstanceID) || e.ProjectNumber <= 0:
		return nil, refuse("it is not about an instance: it lacks google.compute_engine (format=full)")
	case !slices.Contains(a.Projects, e.ProjectID) && !slices.Contains(a.Projects, strconv.FormatInt(e.ProjectNumber, 10)):
		return nil, refuse("project %s is not in enrolment.cloud.gcp", e.ProjectID)
	}
	region := e.Zone // of "europe-west4-a" without the last part
	if i := strings.LastIndexByte(e.Zone, '-'); i > 0 {
		region = e.Zone[:i]
	}
	if len(a.Regions) > 0 && !slices.Contains(a.Regions, region) {
		return nil, refuse("region %s is not in enrolment.cloud.gcp", region)
	}
	return &Instance{
		Name: "gcp/" + strconv.FormatInt(e.ProjectNumber, 10) + "/" + e.InstanceID,
		Attributes: attributes("provider", cloud.GCP, "project", e.ProjectID, "region", region, "zone", e.Zone,
			"instance_id", e.InstanceID, "instance_name", e.InstanceName),
	}, nil
}
