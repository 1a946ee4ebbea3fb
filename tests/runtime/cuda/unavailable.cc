// What a check is in a build without the part that it checks.
#include <cstdio>

int main() {
  std::printf("skipped: %s\n", LOWBAND_WHY_UNAVAILABLE);
  return 77;
}
