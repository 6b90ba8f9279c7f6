package flowctl

import (
	"crypto/tls"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// The variables that DialEnv reads.
const (
	envAddress    = "APERTURE_AGENT_ADDRESS"
	envAPIKey     = "APERTURE_API_KEY"
	envInsecure   = "APERTURE_AGENT_INSECURE"
	envSkipVerify = "APERTURE_AGENT_SKIP_VERIFY"
)

// DialEnv is [Dial] with settings of the environment. APERTURE_AGENT_ADDRESS is the agent's address, and must be set.
// APERTURE_API_KEY is the key. A true APERTURE_AGENT_INSECURE means plaintext instead of TLS. A true
// APERTURE_AGENT_SKIP_VERIFY means TLS that trusts any certificate. Options override the environment. An error names
// its variable, and not the variable's value.
func DialEnv(opts ...Option) (*Client, error) {
	address := os.Getenv(envAddress)
	if address == "" {
		return nil, fmt.Errorf("headgate: dial: %s is not set", envAddress)
	}
	cfg, err := newConfig(true, opts)
	if err != nil {
		return nil, fmt.Errorf("headgate: dial: %w", err)
	}
	if err := checkAddress(address, cfg); err != nil {
		return nil, fmt.Errorf("headgate: dial: %s: %w", envAddress, err)
	}
	if err := cfg.readEnv(); err != nil {
		return nil, fmt.Errorf("headgate: dial: %w", err)
	}
	return dial(address, cfg)
}

// readEnv sets what no option has set.
func (c *config) readEnv() error {
	if key := os.Getenv(envAPIKey); key != "" && c.apiKey == "" {
		if err := checkAPIKey(key); err != nil {
			return fmt.Errorf("%s: %w", envAPIKey, err)
		}
		c.apiKey, c.plaintextEnv = key, envAPIKey
	}
	plaintext, err := envBool(envInsecure)
	if err != nil {
		return err
	}
	skipVerify, err := envBool(envSkipVerify)
	if err != nil {
		return err
	}
	switch {
	case c.insecure || c.tls != nil || c.creds != nil:
	case plaintext:
		c.insecure, c.plaintextEnv = true, envInsecure
	case skipVerify:
		c.tls = &tls.Config{InsecureSkipVerify: true} //nolint:gosec // asked for by name
	}
	return nil
}

func envBool(name string) (bool, error) {
	text := os.Getenv(name)
	if text == "" {
		return false, nil
	}
	b, err := strconv.ParseBool(strings.ToLower(strings.TrimSpace(text)))
	if err != nil {
		return false, fmt.Errorf("%s is neither true nor false", name)
	}
	return b, nil
}
