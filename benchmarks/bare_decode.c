/* The limit of any CPU loader: libjpeg-turbo decoding the rows and columns of a crop window, and nothing else.
 *
 * Reads lines "PATH X Y WIDTH HEIGHT" from standard input, holds the files in memory, decodes every window `rounds`
 * times in one thread and prints, for each round, the CPU microseconds per image.
 *
 *     gcc -O2 -o bare_decode bare_decode.c -ljpeg && ./bare_decode ROUNDS < windows.txt
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <jpeglib.h>

struct item {
    unsigned char *data;
    size_t size;
    JDIMENSION x, y, width, height;
};

static double cpu_seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
    return now.tv_sec + now.tv_nsec * 1e-9;
}

/* Decode the window into `out`, which holds 3 * (width + 32) bytes a row. CMYK is left as it is: a limit, not a loader. */
static void decode(const struct item *item, unsigned char *out)
{
    struct jpeg_decompress_struct info;
    struct jpeg_error_mgr errors;
    info.err = jpeg_std_error(&errors);
    jpeg_create_decompress(&info);
    jpeg_mem_src(&info, item->data, item->size);
    jpeg_read_header(&info, TRUE);
    if (info.jpeg_color_space != JCS_CMYK && info.jpeg_color_space != JCS_YCCK)
        info.out_color_space = JCS_RGB;
    jpeg_start_decompress(&info);
    JDIMENSION x = item->x, width = item->width;
    jpeg_crop_scanline(&info, &x, &width);
    if (item->y)
        jpeg_skip_scanlines(&info, item->y);
    size_t stride = (size_t)info.output_width * info.output_components;
    for (JDIMENSION row = 0; row < item->height; row++) {
        JSAMPROW line = out + row * stride;
        jpeg_read_scanlines(&info, &line, 1);
    }
    jpeg_abort_decompress(&info); /* stop early: what lies below the window is not even entropy-decoded */
    jpeg_destroy_decompress(&info);
}

static struct item read_item(const char *line)
{
    char path[4096];
    struct item item;
    if (sscanf(line, "%4095s %u %u %u %u", path, &item.x, &item.y, &item.width, &item.height) != 5) {
        fprintf(stderr, "not PATH X Y WIDTH HEIGHT: %s", line);
        exit(2);
    }
    FILE *file = fopen(path, "rb");
    if (!file) {
        perror(path);
        exit(2);
    }
    fseek(file, 0, SEEK_END);
    item.size = ftell(file);
    rewind(file);
    item.data = malloc(item.size);
    if (fread(item.data, 1, item.size, file) != item.size) {
        perror(path);
        exit(2);
    }
    fclose(file);
    return item;
}

int main(int argc, char **argv)
{
    int rounds = argc > 1 ? atoi(argv[1]) : 1;
    struct item *items = NULL;
    size_t count = 0, largest = 0;
    char line[4200];
    while (fgets(line, sizeof line, stdin)) {
        items = realloc(items, (count + 1) * sizeof *items);
        items[count] = read_item(line);
        size_t need = 4 * (size_t)(items[count].width + 64) * items[count].height;
        largest = need > largest ? need : largest;
        count++;
    }
    unsigned char *out = malloc(largest + 1);
    memset(out, 0, largest + 1);
    for (int round = -1; round < rounds; round++) { /* the first warms up */
        double began = cpu_seconds();
        for (size_t i = 0; i < count; i++)
            decode(&items[i], out);
        if (round >= 0)
            printf("%.3f\n", (cpu_seconds() - began) / count * 1e6);
    }
    return 0;
}
