// The activations of a vector of floats: for kernels.inl and amx.cpp, which declare Vector, Ints (32 bits, as many), splat and clip.

// e^x to 1e-7, for x clipped to ±87: x = k·ln 2 + r, a polynomial in r (Cephes), and k added to the exponent.
inline Vector exponential(Vector x) {
  x = clip(x, splat(-87.0f), splat(87.0f));
  const Vector scaled = x * 1.44269504f;
  const Ints k = __builtin_convertvector(scaled + (scaled < 0.0f ? splat(-0.5f) : splat(0.5f)), Ints);
  const Vector whole = __builtin_convertvector(k, Vector);
  const Vector r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Vector p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * reinterpret_cast<Vector>((k + 127) << 23);
}

inline Vector sigmoid(Vector x) { return 1.0f / (1.0f + exponential(-x)); }

// x·Φ(x), with Φ(x) = 1/2 + x·p(x²): p is a polynomial in x² mapped to ±1, fitted (least squares, weighted anew until the largest
// errors are equal) so that the error of Φ is at most 5e-7, and none beyond the fitted interval.
inline Vector gelu(Vector x) {
  constexpr float kEnd = 5.25f;
  const Vector inside = clip(x, splat(-kEnd), splat(kEnd));
  const Vector t = inside * inside * (2 / (kEnd * kEnd)) - 1.0f;
  const Vector squared = t * t;
  constexpr float kEven[] = {1.21631881e-03f, 2.52537772e-03f, 8.40654672e-03f, 1.86311413e-02f, 3.20020596e-02f, 4.96484217e-02f, 1.34659312e-01f};
  constexpr float kOdd[] = {-1.71877626e-04f, -2.46092589e-03f, -3.86523364e-03f, -1.36086794e-02f, -2.48328265e-02f, -3.97853506e-02f, -6.71261776e-02f};
  Vector even = splat(kEven[0]), odd = splat(kOdd[0]);  // two sums wait half as long as one
#pragma GCC unroll 6
  for (int i = 1; i < 7; ++i) even = even * squared + kEven[i], odd = odd * squared + kOdd[i];
  const Vector p = odd * t + even;
  return x * (0.5f + clip(inside * p, splat(-0.5f), splat(0.5f)));
}

inline Vector activated(Vector x, Activation activation) {
  switch (activation) {
    case Activation::kSilu: return x * sigmoid(x);
    case Activation::kGelu: return gelu(x);
    case Activation::kGeluTanh: return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x));
    default: return x;
  }
}
