package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
)

// certificate writes a self-signed certificate for 127.0.0.1, and its key.
func certificate(t *testing.T) (cert, key string, pair tls.Certificate, pool *x509.CertPool) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &private.PublicKey, private)
	require.NoError(t, err)
	secret, err := x509.MarshalPKCS8PrivateKey(private)
	require.NoError(t, err)
	dir := t.TempDir()
	cert, key = filepath.Join(dir, "cert"), filepath.Join(dir, "key")
	certPEM, keyPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret})
	require.NoError(t, os.WriteFile(cert, certPEM, 0o600))
	require.NoError(t, os.WriteFile(key, keyPEM, 0o600))
	pair, err = tls.X509KeyPair(certPEM, keyPEM)
	require.NoError(t, err)
	pool = x509.NewCertPool()
	pool.AppendCertsFromPEM(certPEM)
	return cert, key, pair, pool
}

func TestOnlyClientsWithACertificateAreAnswered(t *testing.T) {
	t.Parallel()
	cert, key, pair, pool := certificate(t)
	d := start(t, nil, "-rules", "../examples/rules", "-tls-cert", cert, "-tls-key", key, "-tls-client-ca", cert)
	for _, known := range []bool{true, false} {
		c := &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
		if known {
			c.Certificates = []tls.Certificate{pair}
		}
		client := &http.Client{Transport: &http.Transport{TLSClientConfig: c, DisableKeepAlives: true}}
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+d.address("http")+"/healthz", nil)
		require.NoError(t, err)
		out, err := client.Do(r)
		require.Equal(t, known, err == nil, "HTTP: %v", err)
		if err == nil {
			_ = out.Body.Close()
		}
		conn := d.dial(t, grpc.WithTransportCredentials(credentials.NewTLS(c)))
		_, err = envoyClient(conn).ShouldRateLimit(t.Context(), ask("envoy", "remote_address", "1"))
		require.Equal(t, known, err == nil, "gRPC: %v", err)
	}
}

func TestAHangupReloadsAndDoesNotEnd(t *testing.T) {
	t.Parallel()
	d := start(t, nil, "-rules", "../examples/rules")
	eventually(t, func() bool { return d.get(t, "/readyz").status == 200 }, "it is ready")
	// The kernel may deliver the signal after Kill has returned. It must come before the daemon ends, or it ends this process.
	delivered := make(chan os.Signal, 1)
	signal.Notify(delivered, syscall.SIGHUP)
	defer signal.Stop(delivered)
	require.NoError(t, syscall.Kill(os.Getpid(), syscall.SIGHUP))
	<-delivered
	require.Equal(t, 200, d.get(t, "/readyz").status)
}
