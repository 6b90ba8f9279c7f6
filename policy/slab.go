package policy

// A slab allocates values, many at once.
type slab[T any] struct{ all, free []T }

// take returns n values, which may hold what a use before reset has left in them.
func (s *slab[T]) take(n int) []T {
	const least, most = 64, 1024
	if n > len(s.free) {
		s.all = make([]T, max(n, min(2*len(s.all), most), least))
		s.free = s.all
	}
	taken := s.free[:n:n]
	s.free = s.free[n:]
	return taken
}

// reset takes back what is in use.
func (s *slab[T]) reset() { s.free = s.all }
