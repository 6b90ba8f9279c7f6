// Package difftest compares how package policy reads YAML with how another parser does. It is a module of its own, so
// that no user of Headgate requires that parser.
package difftest
