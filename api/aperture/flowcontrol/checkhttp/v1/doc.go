// Package checkhttpv1 holds the messages and the gRPC service of
// aperture.flowcontrol.checkhttp.v1, by which a client asks a flow-control agent
// about an HTTP request. Everything but this comment is generated from
// checkhttp.proto, which also says what each message and field means.
//
// Most programs never meet it: package flowctl speaks it for them.
package checkhttpv1
