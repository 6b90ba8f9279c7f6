// Package checkv1 holds the messages and the gRPC service of
// aperture.flowcontrol.check.v1, the protocol between a client and a
// flow-control agent. Everything but this comment is generated from
// check.proto, which also says what each message and field means.
//
// Most programs never meet it: package flowctl speaks it for them, and hands
// out a [CheckResponse] only to those who ask for the agent's own words.
package checkv1
