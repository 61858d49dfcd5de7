// Runs every pass once for each kernel size and stride, over buffers of exactly the right size, every thread of a block
// an OS thread: for AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer. Numbers are checked elsewhere.
#include <cstdio>
#include <vector>

#include "algebra.cuh"
#include "launch.cuh"

using namespace effnet_fast;

template <class T>
std::vector<T> values(int64_t count) {
  std::vector<T> made(count);
  for (int64_t i = 0; i < count; ++i) made[i] = from_float<T>((float)(i % 7) * 0.25f - 0.5f);
  return made;
}

template <class T>
void run(const Shape& s, const Launch& on) {
  using Floats = std::vector<float>;
  const int64_t size = s.n * s.pixels() * s.c;
  const auto x = values<T>(size), grad = values<T>(size);
  std::vector<T> out(size);
  const Floats per_channel = values<float>(s.c), per_image = values<float>(s.n * s.c);
  Floats mean(s.c), m2(s.c), sums(5 * s.n * s.c), partials(channel_stats_partials(s, on));
  const float *c = per_channel.data(), *nc = per_image.data();

  Passes<T>::channel_stats(x.data(), mean.data(), m2.data(), s, partials.data(), on);
  partials.assign(pixel_partials(s, 5, on), 0);
  Passes<T>::pool(x.data(), c, c, true, sums.data(), s, partials.data(), on);
  Passes<T>::backward_sums(grad.data(), x.data(), {c, c, c, c}, true, sums.data(), s, partials.data(), on);
  Passes<T>::backward_sums(grad.data(), x.data(), {c, c, c, c}, false, sums.data(), s, partials.data(), on);
  Passes<T>::apply(x.data(), {c, c, nc, true}, grad.data(), out.data(), s, on);
  for (bool silu : {false, true})
    Passes<T>::backward_apply(grad.data(), x.data(), {c, c, c, c, c, nc, nc, silu}, out.data(), s, on);

  for (int kernel : {3, 5, 7})
    for (int stride : {1, 2}) {
      const Window w{kernel, stride, kernel / 2, kernel / 2, (s.h - 1) / stride + 1, (s.w - 1) / stride + 1};
      const int64_t outputs = s.n * w.out_h * w.out_w * s.c;
      const Floats weight = values<float>(s.c * kernel * kernel);
      const auto y = values<T>(outputs), dy = values<T>(outputs);
      std::vector<T> out_y(outputs);
      Floats dweight(weight.size()), pooled(s.n * s.c), pair(2 * s.c);
      partials.assign(dwconv_stats_partials(s, w, on), 0);
      Passes<T>::dwconv_stats(x.data(), weight.data(), {c, c}, out_y.data(), mean.data(), m2.data(), s, w,
                              partials.data(), on);
      partials.assign(dwconv_affine_partials(s, w, on), 0);
      Passes<T>::dwconv_affine(x.data(), weight.data(), {c, c}, c, c, out_y.data(), pooled.data(), s, w, partials.data(),
                               on);
      partials.assign(backward_dwconv_partials(s, w, on), 0);
      Passes<T>::backward_dwconv(dy.data(), y.data(), x.data(), weight.data(), {c, c, c, c, c, nc, nc, true},
                                 {c, c, c, c}, out.data(), dweight.data(), pair.data(), s, w, partials.data(), on);
    }
}

void run_algebra(int64_t images, int channels, int squeezed) {
  using Floats = std::vector<float>;
  const Launch on{nullptr, 1, 1};
  const Floats per_channel = values<float>(channels), matrix = values<float>((int64_t)channels * squeezed);
  const Floats bias = values<float>(squeezed), stats = values<float>(5 * channels);
  const Floats sums = values<float>(5 * images * channels);
  const Floats per_image = values<float>(images * channels), squeeze = values<float>(2 * images * channels);
  const float *c = per_channel.data(), *nc = per_image.data();
  Floats out(5 * channels), grads(4 * channels), gates(2 * images * channels), pooled(images * channels);
  Algebra::batch_norm_stats(c, stats.data(), c, c, 1e-3f, 35, channels, out.data(), on);
  Algebra::batch_norm_grad(stats.data(), sums.data(), 5, nc, nc, 35, images, channels, grads.data(), on);
  Algebra::batch_norm_grad(stats.data(), sums.data(), 2, nullptr, nullptr, 35, images, channels, grads.data(), on);
  const SqueezeWeights mlp{matrix.data(), bias.data(), matrix.data(), c, channels, squeezed};
  Floats hidden(images * squeezed);
  Algebra::squeeze_gate(nc, 35, mlp, images, gates.data(), hidden.data(), on);
  Floats reduce(matrix.size()), reduce_bias(squeezed), expand(matrix.size()), expand_bias(channels);
  Floats partials(2 * images * squeezed);
  Algebra::squeeze_gate_grad(squeeze.data(), nc, 35, mlp, images, pooled.data(),
                             {reduce.data(), reduce_bias.data(), expand.data(), expand_bias.data()}, partials.data(),
                             on);
}

int main() {
  run_algebra(2, 13, 3);
  run<float>({2, 8, 5, 6}, {nullptr, 4, 1});
  run<__nv_bfloat16>({1, 24, 4, 3}, {nullptr, 8, 2});
  run<__nv_bfloat16>({2, 5, 3, 4}, {nullptr, 1, 1});
  std::puts("every pass ran");
}
