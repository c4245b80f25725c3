package containers

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
)

// docker asks by the Docker Engine API (docs.docker.com/reference/api/engine): two GETs,
// for which Docker's client module and what it needs would be much.
type docker struct{ socket Socket }

// maxHeader bounds an answer's header, bytes.
const maxHeader = 64 << 10

func (d docker) ask(ctx context.Context, id string) (*container, error) {
	t := &http.Transport{
		DialContext:        func(ctx context.Context, _, _ string) (net.Conn, error) { return d.socket.dial(ctx) },
		DisableCompression: true, MaxResponseHeaderBytes: maxHeader,
	}
	defer t.CloseIdleConnections()
	client := &http.Client{Transport: t, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}

	var is struct {
		ID     string `json:"Id"`
		Name   string
		Image  string
		Config struct{ Image string }
		State  struct{ Pid int }
	}
	header, err := get(ctx, client, "/containers/"+url.PathEscape(id)+"/json", &is)
	if err != nil {
		return nil, err
	}
	if is.ID != id {
		return nil, fmt.Errorf("%w: asked for container %s, told of %.80q", errMalformed, id, is.ID)
	}
	if is.State.Pid <= 0 {
		return nil, errNotYet
	}
	out := &container{pid: is.State.Pid, name: strings.TrimPrefix(is.Name, "/"), runtime: "docker", image: is.Config.Image, imageID: is.Image}
	if strings.HasPrefix(header.Get("Server"), "Libpod/") {
		out.runtime = "podman"
	}
	if digest(is.Image) == "" {
		return out, nil
	}
	var image struct {
		ID          string `json:"Id"`
		RepoDigests []string
	}
	_, err = get(ctx, client, "/images/"+url.PathEscape(is.Image)+"/json", &image)
	switch {
	case errors.Is(err, errUnknown): // removed since, by force
	case err != nil:
		return nil, err
	case digest(image.ID) != digest(is.Image):
		return nil, fmt.Errorf("%w: asked for image %s, told of %.80q", errMalformed, is.Image, image.ID)
	default:
		out.repoDigests = image.RepoDigests
	}
	return out, nil
}

// get reads the answer to a GET into v.
func get(ctx context.Context, client *http.Client, path string, v any) (http.Header, error) {
	// The name of the host is nobody's.
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://runtime"+path, nil)
	if err != nil {
		return nil, err
	}
	res, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	switch res.StatusCode {
	case http.StatusOK:
	case http.StatusNotFound:
		return nil, errUnknown
	default:
		return nil, fmt.Errorf("%w: HTTP status %d", errMalformed, res.StatusCode)
	}
	body, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer+1))
	if err != nil {
		return nil, err
	}
	if len(body) > maxAnswer {
		return nil, fmt.Errorf("%w: more than %d bytes", errMalformed, maxAnswer)
	}
	if err := json.Unmarshal(body, v); err != nil {
		return nil, fmt.Errorf("%w: %w", errMalformed, err)
	}
	return res.Header, nil
}
