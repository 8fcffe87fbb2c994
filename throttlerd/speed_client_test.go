//go:build ratelimit

package main

// The client of the comparison with envoyproxy/ratelimit.

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"testing"

	ratelimitv3 "github.com/envoyproxy/go-control-plane/envoy/service/ratelimit/v3"
	"github.com/stretchr/testify/require"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/protobuf/proto"
)

// client calls a gRPC server on a connection of its own, one call after the other. Only one goroutine may use it. It writes
// and reads the frames itself: the client of grpc-go takes as much of the processors as the servers do, which hides a part of
// what they differ by.
type client struct {
	conn   net.Conn
	framer *http2.Framer // writes to out
	out    bytes.Buffer
	fields *hpack.Encoder // writes to block
	block  bytes.Buffer
	stream uint32 // of the next call
}

func dial(b *testing.B, address string) *client {
	b.Helper()
	conn, err := (&net.Dialer{}).DialContext(b.Context(), "tcp", address)
	require.NoError(b, err)
	b.Cleanup(func() { _ = conn.Close() })
	c := &client{conn: conn, stream: 1}
	c.framer = http2.NewFramer(&c.out, bufio.NewReader(conn))
	c.framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil) // the size that HTTP/2 begins with
	c.framer.SetReuseFrames()
	c.fields = hpack.NewEncoder(&c.block)
	c.out.WriteString(http2.ClientPreface)
	require.NoError(b, c.framer.WriteSettings())
	require.NoError(b, c.framer.WriteWindowUpdate(0, 1<<30)) // of all that a run answers, so that no call sends another
	require.NoError(b, c.flush())                            // a server closes a connection that says nothing
	return c
}

// ShouldRateLimit makes a call. The frames of the request are one write, as those of grpc-go's client are.
func (c *client) ShouldRateLimit(r *ratelimitv3.RateLimitRequest) (*ratelimitv3.RateLimitResponse, error) {
	message, err := proto.MarshalOptions{}.MarshalAppend(make([]byte, 5, 128), r)
	if err != nil {
		return nil, err
	}
	binary.BigEndian.PutUint32(message[1:], uint32(len(message)-5)) //nolint:gosec // some 50 bytes
	c.block.Reset()
	for _, f := range [...]hpack.HeaderField{
		{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "http"}, {Name: ":authority", Value: "d"},
		{Name: ":path", Value: ratelimitv3.RateLimitService_ShouldRateLimit_FullMethodName},
		{Name: "content-type", Value: "application/grpc"}, {Name: "te", Value: "trailers"}, {Name: "user-agent", Value: "speed"},
	} {
		_ = c.fields.WriteField(f) // a bytes.Buffer takes all
	}
	if err := c.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: c.stream, BlockFragment: c.block.Bytes(), EndHeaders: true}); err != nil {
		return nil, err
	}
	if err := c.framer.WriteData(c.stream, true, message); err != nil {
		return nil, err
	}
	c.stream += 2
	if err := c.flush(); err != nil {
		return nil, err
	}
	return c.receive()
}

func (c *client) flush() error {
	_, err := c.conn.Write(c.out.Bytes())
	c.out.Reset()
	return err
}

func (c *client) receive() (*ratelimitv3.RateLimitResponse, error) {
	var message []byte
	for {
		frame, err := c.framer.ReadFrame()
		if err != nil {
			return nil, err
		}
		switch f := frame.(type) {
		case *http2.DataFrame:
			message = append(message, f.Data()...)
		case *http2.MetaHeadersFrame:
			if f.StreamEnded() {
				return responseOf(f, message)
			}
		case *http2.SettingsFrame:
			if !f.IsAck() {
				err = c.framer.WriteSettingsAck()
			}
		case *http2.PingFrame:
			if !f.IsAck() {
				err = c.framer.WritePing(true, f.Data)
			}
		case *http2.GoAwayFrame, *http2.RSTStreamFrame:
			err = fmt.Errorf("the server ended the call: %v", f)
		}
		if err == nil && c.out.Len() > 0 {
			err = c.flush()
		}
		if err != nil {
			return nil, err
		}
	}
}

func responseOf(trailers *http2.MetaHeadersFrame, message []byte) (*ratelimitv3.RateLimitResponse, error) {
	for _, f := range trailers.Fields {
		if f.Name == "grpc-status" && f.Value == "0" && len(message) >= 5 {
			r := &ratelimitv3.RateLimitResponse{}
			return r, proto.Unmarshal(message[5:], r)
		}
	}
	return nil, fmt.Errorf("the call failed: %v", trailers.Fields)
}
