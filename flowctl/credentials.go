package flowctl

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
)

func transportCredentials(cfg *config) credentials.TransportCredentials {
	switch {
	case cfg.creds != nil:
		return cfg.creds
	case cfg.insecure:
		return insecure.NewCredentials()
	case cfg.tls != nil:
		return credentials.NewTLS(cfg.tls)
	default:
		return credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS12})
	}
}

// keyCredentials adds the API key to each call, besides what the caller's context brings.
type keyCredentials struct {
	metadata  map[string]string
	plaintext bool
}

func (k *keyCredentials) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return k.metadata, nil
}

func (k *keyCredentials) RequireTransportSecurity() bool { return !k.plaintext }

// checkAPIKey returns why the key cannot travel in a header. The error does not show the key.
func checkAPIKey(key string) error {
	if key == "" {
		return errors.New("the key is empty")
	}
	for i := range len(key) {
		if key[i] < ' ' || key[i] > '~' {
			return fmt.Errorf("the key has a character at %d that is not printable ASCII", i)
		}
	}
	return nil
}
