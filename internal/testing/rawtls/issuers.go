package rawtls

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"time"
)

const (
	primeBits = 512       // so short that primes are found soon
	exponent  = 1<<31 - 1 // the largest that crypto/rsa takes. With it verifying takes longest
)

// named is a certificate of an authority.
func named(name string, number int) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: big.NewInt(int64(number)), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true,
	}
}

// Issuers makes n certificates of authorities that have the name. Their RSA keys of so many bits are random odd numbers, so they cost
// nothing, and nobody can sign by them.
func Issuers(name string, n, bits int) ([][]byte, error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	made := make([][]byte, 0, n)
	for i := range n {
		modulus := make([]byte, bits/8)
		_, _ = rand.Read(modulus)
		modulus[0] |= 0x80 // or else a signature is too large for it, which costs nothing to see
		modulus[len(modulus)-1] |= 1
		key := &rsa.PublicKey{N: new(big.Int).SetBytes(modulus), E: exponent}
		der, err := x509.CreateCertificate(rand.Reader, named(name, i), named("nobody", 0), key, private)
		if err != nil {
			return nil, err
		}
		made = append(made, der)
	}
	return made, nil
}

// Crossed makes a client's certificate of an authority unknown to the server. As many authorities as first can have issued it, and as
// many as second can have issued each of those. All have RSA keys of 8192 bits. Crypto/x509 tries all pairs. If first is 0, there are
// only the second.
func Crossed(first, second int) (tls.Certificate, error) {
	const bits = 8192
	issuer := &rsa.PrivateKey{PublicKey: rsa.PublicKey{E: exponent}}
	for issuer.D == nil { // the exponent may have no inverse
		modulus, phi := big.NewInt(1), big.NewInt(1)
		issuer.Primes = nil
		for range bits / primeBits {
			prime, err := rand.Prime(rand.Reader, primeBits)
			if err != nil {
				return tls.Certificate{}, err
			}
			issuer.Primes = append(issuer.Primes, prime)
			modulus.Mul(modulus, prime)
			phi.Mul(phi, new(big.Int).Sub(prime, big.NewInt(1)))
		}
		issuer.N, issuer.D = modulus, new(big.Int).ModInverse(big.NewInt(exponent), phi)
	}
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	of := "second"
	if first > 0 {
		of = "first"
	}
	leaf := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, leaf, named(of, 0), private.Public(), issuer)
	if err != nil {
		return tls.Certificate{}, err
	}
	chain := [][]byte{der}
	for i := range first {
		of := named("first", i)
		of.DNSNames = []string{big.NewInt(int64(i)).String()} // or else x509 takes them for one
		der, err := x509.CreateCertificate(rand.Reader, of, named("second", 0), issuer.Public(), issuer)
		if err != nil {
			return tls.Certificate{}, err
		}
		chain = append(chain, der)
	}
	others, err := Issuers("second", second, 8*issuer.Size()) // the length of signatures
	return tls.Certificate{Certificate: append(chain, others...), PrivateKey: private}, err
}
