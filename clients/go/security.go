package mlxpool

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
)

// TLSFiles reads PEM files for WithTLS. ca names the authorities to trust, "" the system's;
// certificate and key are the client's own, for mutual TLS: both or neither.
func TLSFiles(ca, certificate, key string) (*tls.Config, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if ca != "" {
		pem, err := os.ReadFile(ca)
		if err != nil {
			return nil, fmt.Errorf("mlxpool: %w", err)
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("mlxpool: %s has no certificate", ca)
		}
	}
	if certificate != "" || key != "" {
		pair, err := tls.LoadX509KeyPair(certificate, key)
		if err != nil {
			return nil, fmt.Errorf("mlxpool: %w", err)
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return config, nil
}

// bearer is an API key as gRPC's credentials of each call.
type bearer string

func (key bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + string(key)}, nil
}

// RequireTransportSecurity is false because checkKey has decided already.
func (bearer) RequireTransportSecurity() bool { return false }

func checkKey(target string, o *options) error {
	for _, char := range o.apiKey {
		// A line feed, left by an editor, would make the metadata illegal.
		if char <= ' ' || char > '~' {
			return errors.New("mlxpool: the API key has characters that no key has")
		}
	}
	if o.tls == nil && !o.allowsPlainKey && !isLoopback(target) {
		return fmt.Errorf(
			"mlxpool: the API key would travel to %s in plaintext; use WithTLS, or WithPlaintextKey "+
				"where the network itself is trusted", target)
	}
	return nil
}

// isLoopback tells whether target names this machine.
func isLoopback(target string) bool {
	if strings.HasPrefix(target, "unix:") || strings.HasPrefix(target, "unix-abstract:") {
		return true
	}
	for _, scheme := range []string{"dns:", "passthrough:"} {
		target = strings.TrimPrefix(target, scheme)
	}
	host, _, err := net.SplitHostPort(strings.TrimLeft(target, "/"))
	if err != nil {
		return false
	}
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}
